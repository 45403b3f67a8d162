"""ImageCaptionFolder and the reading of odd picture files."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tokenloom import media
from tokenloom.data.captions import Caption, write_captions
from tokenloom.data.dataset import ImageCaptionFolder, fit_square
from tokenloom.errors import TokenloomError
from tokenloom.media import open_image

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six captioned pictures of 8 x 8, two styles, three splits."""
    captions = []
    for index, (style, split) in enumerate(
        [
            ("flat", "train"),
            ("flat", "val"),
            ("3d", "train"),
            ("3d", None),
            ("3d", "val_style"),
            ("flat", "train"),
        ]
    ):
        Image.new("RGB", (8, 8), (40 * index, 0, 255)).save(tmp_path / f"{index}.png")
        group, licence = ("food", "MIT") if index % 2 else ("animals", "CC0")
        captions.append(
            Caption(
                file=f"{index}.png",
                text=f"picture {index}",
                label=f"thing {index}",
                tags=("one", "two", "three"),
                style=style,
                split=split,
                group=group,
                licence=licence,
            )
        )
    write_captions(tmp_path, captions)
    return tmp_path


def test_items_have_the_promised_form(folder: Path) -> None:
    data = ImageCaptionFolder(folder, size=8)
    item = data[2]
    assert len(data) == 6
    assert item["pixels"].shape == (3, 8, 8)
    assert item["pixels"].dtype == torch.float32
    assert item["pixels"][:, 0, 0].tolist() == pytest.approx([80 / 127.5 - 1, -1.0, 1.0])
    assert (item["text"], item["index"]) == ("picture 2", 2)
    assert data[-1]["index"] == 5
    with pytest.raises(IndexError):
        data[6]
    assert len(list(data)) == 6


def test_filters(folder: Path) -> None:
    def texts(**options: object) -> str:
        return "".join(text[-1] for text in ImageCaptionFolder(folder, size=8, **options).texts())

    assert texts() == "012345"
    assert texts(split="train") == "0235"
    assert texts(split=["val", "val_style"]) == "14"
    assert texts(split="train", styles=["flat"]) == "05"
    assert texts(groups=["food"], licences=["MIT"], styles=["3d"]) == "3"
    with pytest.raises(TokenloomError, match=r"Unknown style 'flatt'\. Did you mean 'flat'"):
        texts(styles=["flatt"])
    with pytest.raises(TokenloomError, match="Unknown split 'test'"):
        texts(split="test")
    with pytest.raises(TokenloomError, match="Expected a list of style values"):
        texts(styles="flat")
    with pytest.raises(TokenloomError, match="nothing is left"):
        texts(groups=[])


def test_cache_and_stack_agree_with_items(folder: Path) -> None:
    plain, cached = ImageCaptionFolder(folder, size=8), ImageCaptionFolder(folder, size=8, cache=True)
    stacked = plain.stack()
    assert stacked.dtype == torch.uint8
    assert stacked.shape == (6, 3, 8, 8)
    assert torch.equal(stacked, cached.stack())
    for path in folder.glob("*.png"):
        path.unlink()
    for index in range(6):
        assert torch.equal(cached[index]["pixels"], stacked[index].float() / 127.5 - 1)
    with pytest.raises(TokenloomError, match=r"0\.png"):
        plain.stack()


def test_varied_captions_follow_torchs_seed(folder: Path) -> None:
    data = ImageCaptionFolder(folder, size=8, vary_captions=True)
    torch.manual_seed(5)
    first = [data[0]["text"] for _ in range(30)]
    torch.manual_seed(5)
    assert [data[0]["text"] for _ in range(30)] == first
    assert len(set(first)) > 4
    assert all(text.startswith("a flat picture of thing 0") for text in first)


def test_a_loader_makes_batches(folder: Path) -> None:
    data = ImageCaptionFolder(folder, size=8, cache=True)
    batch = next(iter(torch.utils.data.DataLoader(data, batch_size=4)))
    assert batch["pixels"].shape == (4, 3, 8, 8)
    assert batch["text"] == [f"picture {index}" for index in range(4)]
    assert batch["index"].tolist() == [0, 1, 2, 3]


def test_a_folder_without_captions(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("b/2.JPG", "1.png", ".hidden/3.png", "._4.png"):
        Image.new("RGB", (5, 5), RED).save(tmp_path / name, format="PNG")
    (tmp_path / "notes.txt").write_text("no picture")
    data = ImageCaptionFolder(tmp_path, split="train", size=4)
    assert [caption.file for caption in data.captions] == ["1.png", "b/2.JPG"]
    assert data[1]["text"] == ""
    with pytest.raises(TokenloomError, match=r'no line of its captions\.jsonl has the key "style"'):
        ImageCaptionFolder(tmp_path, styles=["flat"])


def test_wrong_roots_and_options(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(TokenloomError, match="Expected a folder of pictures"):
        ImageCaptionFolder(tmp_path / "missing")
    with pytest.raises(TokenloomError, match="where there is a file"):
        ImageCaptionFolder(folder / "0.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TokenloomError, match=r"neither a captions\.jsonl nor a picture"):
        ImageCaptionFolder(tmp_path / "empty")
    with pytest.raises(TokenloomError, match="Unknown fit 'padd'"):
        ImageCaptionFolder(folder, fit="padd")
    with pytest.raises(TokenloomError, match="positive whole number"):
        ImageCaptionFolder(folder, size=0)


def test_an_unreadable_file_is_named(folder: Path) -> None:
    (folder / "3.png").write_bytes(b"this is no picture")
    with pytest.raises(TokenloomError, match=r"3\.png.* not a picture"):
        ImageCaptionFolder(folder, size=8)[3]
    with pytest.raises(TokenloomError, match=r"3\.png"):
        ImageCaptionFolder(folder, size=8, cache=True)


@pytest.mark.parametrize("fit", ["pad", "crop"])
@pytest.mark.parametrize("size", [(1, 1), (20000, 3), (3, 20000), (63, 64), (640, 480)])
def test_every_shape_becomes_a_square(size: tuple[int, int], fit: str) -> None:
    square = fit_square(Image.new("RGB", size, RED), 64, fit)
    assert square.size == (64, 64)
    assert square.getpixel((31, 31)) == RED
    corners = {square.getpixel(place) for place in ((0, 0), (0, 63), (63, 0), (63, 63))}
    if fit == "crop" or size == (1, 1):
        assert corners == {RED}
    else:
        assert WHITE in corners


def test_padding_keeps_all_and_cropping_the_middle() -> None:
    wide = Image.new("RGB", (40, 20), RED)
    wide.paste(BLUE, (0, 0, 10, 20))
    padded, cropped = fit_square(wide, 40, "pad"), fit_square(wide, 20, "crop")
    assert [padded.getpixel((2, y)) for y in (5, 20, 35)] == [WHITE, BLUE, WHITE]
    assert cropped.getpixel((0, 10)) == RED
    assert fit_square(padded, 40) is padded


def save(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def test_transparent_parts_become_white(tmp_path: Path) -> None:
    clear, half = Image.new("RGBA", (2, 2), (*RED, 0)), Image.new("RGBA", (2, 2), (*RED, 128))
    assert open_image(save(tmp_path / "a.png", clear)).getpixel((0, 0)) == WHITE
    assert open_image(save(tmp_path / "b.png", half)).getpixel((0, 0)) == (255, 127, 127)
    assert open_image(save(tmp_path / "c.webp", clear, lossless=True)).getpixel((0, 0)) == WHITE
    grey = Image.new("LA", (2, 2), (0, 0))
    assert open_image(save(tmp_path / "d.png", grey)).getpixel((0, 0)) == WHITE
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([*BLUE, *RED])
    assert open_image(save(tmp_path / "e.png", palette)).getpixel((0, 0)) == RED
    assert open_image(save(tmp_path / "f.png", palette, transparency=1)).getpixel((0, 0)) == WHITE
    assert open_image(save(tmp_path / "g.gif", palette, transparency=1)).getpixel((0, 0)) == WHITE
    keyed = Image.new("RGB", (2, 2), RED)
    assert open_image(save(tmp_path / "h.png", keyed, transparency=RED)).getpixel((0, 0)) == WHITE


def test_deep_and_unusual_modes(tmp_path: Path) -> None:
    deep = Image.fromarray(np.full((2, 2), 32768, dtype=np.uint16))
    assert open_image(save(tmp_path / "a.png", deep)).getpixel((0, 0)) == (128, 128, 128)
    floats = Image.fromarray(np.array([[0.5, np.nan]], dtype=np.float32))
    assert [open_image(save(tmp_path / "b.tiff", floats)).getpixel((x, 0))[0] for x in (0, 1)] == [128, 0]
    bits = Image.new("1", (2, 2), 1)
    assert open_image(save(tmp_path / "c.png", bits)).getpixel((0, 0)) == WHITE
    for mode in ("RGBa", "La", "PA", "RGBX", "YCbCr", "HSV", "LAB", "I", "I;16B"):
        assert media.to_rgb(Image.new(mode, (2, 3))).mode == "RGB"


def test_cmyk_jpeg_is_not_inverted(tmp_path: Path) -> None:
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    red, green, blue = open_image(save(tmp_path / "a.jpg", cyan, quality=100)).getpixel((8, 8))
    assert red < 20
    assert min(green, blue) > 235


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_animations_give_their_first_frame(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, BLUE)]
    options = {"lossless": True} if suffix == "webp" else {}
    path = save(tmp_path / f"a.{suffix}", frames[0], save_all=True, append_images=frames[1:], **options)
    with Image.open(path) as image:
        assert image.n_frames == 2
    assert open_image(path).getpixel((8, 8)) == RED


def test_camera_orientation_is_applied(tmp_path: Path) -> None:
    picture = Image.new("RGB", (20, 10), BLUE)
    picture.paste(RED, (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to see it upright: the left half goes to the top
    upright = open_image(save(tmp_path / "a.png", picture, exif=exif))
    assert upright.size == (10, 20)
    assert upright.getpixel((5, 2)) == RED
    assert upright.getpixel((5, 17)) == BLUE


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif"])
def test_a_file_cut_short_is_an_error(tmp_path: Path, suffix: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    path = save(tmp_path / f"a.{suffix}", noise)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(TokenloomError, match=rf"a\.{suffix}"):
        open_image(path)


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9500, 60000])
def test_gigantic_pictures_are_refused_unread(tmp_path: Path, side: int) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(side, side))
    with pytest.raises(TokenloomError, match="too large"):
        open_image(path)


def test_pictures_without_pixels_are_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "TIFF")
    data = buffer.getvalue()
    width = struct.pack("<HHI", 256, 4, 1)  # the entry "image width: one long"
    assert width in data
    (tmp_path / "zero.tiff").write_bytes(data.replace(width + b"\1", width + b"\0"))
    (tmp_path / "zero.png").write_bytes(png_header(0, 5))
    for name in ("zero.tiff", "zero.png"):
        with pytest.raises(TokenloomError, match=name.replace(".", r"\.")):
            open_image(tmp_path / name)


def test_paths_that_are_no_pictures(tmp_path: Path) -> None:
    with pytest.raises(TokenloomError, match="There is no picture file"):
        open_image(tmp_path / "missing.png")
    with pytest.raises(TokenloomError, match="got the folder"):
        open_image(tmp_path)
    (tmp_path / "empty.png").touch()
    with pytest.raises(TokenloomError, match="is empty"):
        open_image(tmp_path / "empty.png")
