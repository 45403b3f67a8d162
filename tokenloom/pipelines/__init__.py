"""What users call: a tokenizer, a generator and the words between them, in the shape of a diffusers pipeline.

Nothing is imported until it is asked for, so that `import tokenloom.pipelines` stays cheap.
"""

from __future__ import annotations

from tokenloom.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "AudioContinuationOutput": "audio_continuation",
        "AudioContinuationPipeline": "audio_continuation",
        "Reconstruction": "reconstruction",
        "SegmentationOutput": "segmentation",
        "SegmentationPipeline": "segmentation",
        "TextToImageOutput": "text_to_image",
        "TextToImagePipeline": "text_to_image",
        "VideoOutput": "video",
        "VideoPipeline": "video",
        "reconstruct_image": "reconstruction",
    },
)
