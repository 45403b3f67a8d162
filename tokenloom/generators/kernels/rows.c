/* Few rows on a processor: matrix products, a whole stack of transformer blocks, and the drawing of codes.

   A step of a generation has few rows, so its time is that of reading weights, if nothing else costs more than that: one call
   runs all blocks. Everything is float32, weights optionally int8 with a scale an output, and rows optionally int8 with a scale
   a row as well. Compiled on the machine that runs it by `tokenloom.generators.kernels.build`; the structures are repeated there. R rows, D width, h heads, d head width, L
   visible rows. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif
#ifdef _OPENMP
#define PARALLEL _Pragma("omp parallel for num_threads(threads) if (threads > 1)")
#else
#define PARALLEL
#endif
#define SPREAD (1 << 18) /* weights from which a product uses all threads */

typedef float v8 __attribute__((vector_size(32)));
typedef int32_t i8 __attribute__((vector_size(32)));
typedef float v8u __attribute__((vector_size(32), aligned(4), may_alias));
typedef int8_t b8u __attribute__((vector_size(8), aligned(1), may_alias));

static inline v8 load_f32(const float *p) { return (v8)*(const v8u *)p; }
static inline void store(float *p, v8 a) { *(v8u *)p = (v8u)a; }
#ifdef __AVX2__ /* three times as fast as what gcc makes of the general form */
static inline v8 load_i8(const int8_t *p) {
  return (v8)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
#else
static inline v8 load_i8(const int8_t *p) { return __builtin_convertvector(*(const b8u *)p, v8); }
#endif
static inline float total(v8 a) { return ((a[0] + a[4]) + (a[1] + a[5])) + ((a[2] + a[6]) + (a[3] + a[7])); }
static inline v8 all(float a) { return (v8){a, a, a, a, a, a, a, a}; }
static inline v8 pick(i8 which, v8 a, v8 b) { return (v8)((which & (i8)a) | (~which & (i8)b)); }

/* exp, to about two units in the last place: 2^n times a polynomial of the rest. */
static inline v8 exp8(v8 x) {
  x = pick(x > 88.0f, all(88.0f), pick(x < -87.0f, all(-87.0f), x));
  v8 shifted = x * 1.44269504f + 12582912.0f; /* rounds to a whole number in the low bits */
  v8 whole = shifted - 12582912.0f;
  v8 rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  v8 sum = all(1.9875691500e-4f);
  sum = sum * rest + 1.3981999507e-3f;
  sum = sum * rest + 8.3334519073e-3f;
  sum = sum * rest + 4.1665795894e-2f;
  sum = sum * rest + 1.6666665459e-1f;
  sum = sum * rest + 5.0000001201e-1f;
  sum = sum * rest * rest + rest + 1.0f;
  i8 power = ((i8)shifted - 0x4b400000 + 127) << 23;
  return sum * (v8)power;
}

/* ---- products: y (R, outputs) of x (R, width) and weights (outputs, width) ---- */

typedef struct {
  const void *weight;       /* float32, or int8 where there is a scale */
  const float *scale, *bias; /* (outputs) or 0 */
  int64_t outputs, width;
  int64_t whole; /* whether rows are rounded to int8, too; weights are int8 of -127 to 127 then */
} linear_t;

/* Four sums over lanes at once. */
static inline void totals(v8 a, v8 b, v8 c, v8 d, float *to) {
#ifdef __AVX2__
  __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps((__m256)a, (__m256)b), _mm256_hadd_ps((__m256)c, (__m256)d));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
#else
  to[0] = total(a), to[1] = total(b), to[2] = total(c), to[3] = total(d);
#endif
}

/* M rows by R outputs; M R is a multiple of 4, or both are 1. AHEAD: whether to ask memory for the next R outputs. */
#define TILE(NAME, TYPE, LOAD, M, R, AHEAD)                                                                  \
  static inline void NAME(const float *x, const TYPE *w, const float *scale, const float *bias, float *y,   \
                          long outputs, long width) {                                                       \
    v8 sums[M * R];                                                                                         \
    float found[M * R];                                                                                     \
    for (int i = 0; i < M * R; i++) sums[i] = (v8){0};                                                      \
    long k = 0;                                                                                             \
    for (; k + 8 <= width; k += 8) {                                                                        \
      v8 in[M];                                                                                             \
      for (int m = 0; m < M; m++) in[m] = load_f32(x + m * width + k);                                      \
      for (int r = 0; r < R; r++) {                                                                         \
        v8 weight = LOAD(w + r * width + k);                                                                \
        if (AHEAD && !(k * sizeof(TYPE) % 64)) __builtin_prefetch(w + (R + r) * width + k);                 \
        for (int m = 0; m < M; m++) sums[m * R + r] += in[m] * weight;                                      \
      }                                                                                                     \
    }                                                                                                       \
    if (M * R % 4)                                                                                          \
      for (int i = 0; i < M * R; i++) found[i] = total(sums[i]);                                            \
    else                                                                                                    \
      for (int i = 0; i + 4 <= M * R; i += 4) totals(sums[i], sums[i + 1], sums[i + 2], sums[i + 3], found + i); \
    for (int m = 0; m < M; m++) for (int r = 0; r < R; r++) {                                               \
      float sum = found[m * R + r];                                                                         \
      for (long j = k; j < width; j++) sum += x[m * width + j] * w[r * width + j];                          \
      if (scale) sum *= scale[r];                                                                           \
      y[m * outputs + r] = bias ? sum + bias[r] : sum;                                                      \
    }                                                                                                       \
  }

#define RUN(NAME, R)                                                                                        \
  for (; r + R <= count; r += R)                                                                            \
    NAME(x + m * width, w + (o + r) * width, scale ? scale + o + r : 0, bias ? bias + o + r : 0,            \
         y + m * outputs + o + r, outputs, width);

#define KERNEL(KIND, TYPE, ONE)                                                                             \
  TILE(KIND##_1_8, TYPE, load_##KIND, 1, 8, ONE) TILE(KIND##_1_1, TYPE, load_##KIND, 1, 1, 0)                       \
  TILE(KIND##_2_6, TYPE, load_##KIND, 2, 6, 1) TILE(KIND##_2_1, TYPE, load_##KIND, 2, 1, 0)                       \
  TILE(KIND##_3_4, TYPE, load_##KIND, 3, 4, 1) TILE(KIND##_3_1, TYPE, load_##KIND, 3, 1, 0)                       \
  TILE(KIND##_4_3, TYPE, load_##KIND, 4, 3, 1) TILE(KIND##_4_1, TYPE, load_##KIND, 4, 1, 0)                 \
  TILE(KIND##_4_3_near, TYPE, load_##KIND, 4, 3, 0)                                                         \
  static void product_##KIND(const float *x, const TYPE *w, const float *scale, const float *bias,          \
                             float *y, long rows, long outputs, long width, int threads) {                  \
    PARALLEL                                                                                                \
    for (long o = 0; o < outputs; o += 24) {                                                                \
      long count = outputs - o < 24 ? outputs - o : 24;                                                     \
      for (long m = 0; m < rows; m += 4) {                                                                  \
        long r = 0;                                                                                         \
        switch (rows - m) {                                                                                 \
          case 1: RUN(KIND##_1_8, 8) RUN(KIND##_1_1, 1) break;                                              \
          case 2: RUN(KIND##_2_6, 6) RUN(KIND##_2_1, 1) break;                                              \
          case 3: RUN(KIND##_3_4, 4) RUN(KIND##_3_1, 1) break;                                              \
          default:                                                                                          \
            if (m) { RUN(KIND##_4_3_near, 3) } else { RUN(KIND##_4_3, 3) }                                  \
            RUN(KIND##_4_1, 1)                                                                              \
        }                                                                                                   \
      }                                                                                                     \
    }                                                                                                       \
  }

KERNEL(f32, float, 0)
KERNEL(i8, int8_t, 1)

/* Sums of products of whole numbers: M rows by R outputs, 32 places at a time as long as there are so many. Both factors lie
   within 127, so that two products fit into 16 bits. */
#define WHOLE(M, R)                                                                                          \
  static inline void whole_##M##_##R(const int8_t *x, const int8_t *w, int32_t *found, long width) {          \
    long k = 0;                                                                                             \
    for (int i = 0; i < M * R; i++) found[i] = 0;                                                           \
    WHOLE_WIDE(M, R)                                                                                        \
    for (; k < width; k++)                                                                                  \
      for (int m = 0; m < M; m++)                                                                           \
        for (int r = 0; r < R; r++) found[m * R + r] += (int32_t)x[m * width + k] * w[r * width + k];       \
  }
#ifdef __AVX2__
#if defined(__AVXVNNI__) || (defined(__AVX512VNNI__) && defined(__AVX512VL__))
#ifdef __AVXVNNI__
#define FOURS(sum, a, b) _mm256_dpbusd_avx_epi32(sum, a, b)
#else
#define FOURS(sum, a, b) _mm256_dpbusd_epi32(sum, a, b)
#endif
#else
#define FOURS(sum, a, b) \
  _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)))
#endif
#define WHOLE_WIDE(M, R)                                                                                     \
  __m256i sums[M * R];                                                                                      \
  for (int i = 0; i < M * R; i++) sums[i] = _mm256_setzero_si256();                                         \
  for (; k + 32 <= width; k += 32)                                                                          \
    for (int r = 0; r < R; r++) {                                                                           \
      __m256i weight = _mm256_loadu_si256((const __m256i *)(w + r * width + k)), size = _mm256_abs_epi8(weight); \
      if (!(k % 64)) __builtin_prefetch(w + (R + r) * width + k);                                           \
      for (int m = 0; m < M; m++) {                                                                         \
        __m256i in = _mm256_loadu_si256((const __m256i *)(x + m * width + k));                              \
        sums[m * R + r] = FOURS(sums[m * R + r], size, _mm256_sign_epi8(in, weight));                       \
      }                                                                                                     \
    }                                                                                                       \
  for (int i = 0; i < M * R; i++) {                                                                         \
    int32_t parts[8];                                                                                       \
    _mm256_storeu_si256((__m256i *)parts, sums[i]);                                                         \
    for (int j = 0; j < 8; j++) found[i] += parts[j];                                                       \
  }
#else
#define WHOLE_WIDE(M, R)
#endif
WHOLE(1, 6) WHOLE(1, 1) WHOLE(2, 4) WHOLE(2, 1) WHOLE(4, 2) WHOLE(4, 1)

#define RUN_WHOLE(M, R)                                                                                      \
  for (; r + R <= count; r += R) {                                                                          \
    int32_t found[M * R];                                                                                   \
    whole_##M##_##R(codes + m * width, w + (o + r) * width, found, width);                                  \
    for (int i = 0; i < M * R; i++) {                                                                       \
      long to = o + r + i % R;                                                                              \
      float sum = found[i] * (steps[m + i / R] * scale[to]);                                                \
      y[(m + i / R) * outputs + to] = bias ? sum + bias[to] : sum;                                          \
    }                                                                                                       \
  }

/* 0, or 1 where there is no memory. */
static int product_whole(const float *x, const int8_t *w, const float *scale, const float *bias, float *y, long rows,
                         long outputs, long width, int threads) {
  float *steps = malloc(rows * (sizeof(float) + width));
  if (!steps) return 1;
  int8_t *codes = (int8_t *)(steps + rows);
  for (long m = 0; m < rows; m++) {
    float most = 1e-12f, wrong = 0; /* NaN where a number is not finite, so that the products say so */
    for (long k = 0; k < width; k++) {
      most = fmaxf(most, fabsf(x[m * width + k]));
      wrong += x[m * width + k] * 0;
    }
    steps[m] = most / 127 + wrong;
    for (long k = 0; k < width; k++) codes[m * width + k] = (int8_t)lrintf(x[m * width + k] * (127 / most));
  }
  PARALLEL
  for (long o = 0; o < outputs; o += 24) {
    long count = outputs - o < 24 ? outputs - o : 24;
    for (long m = 0; m < rows;) {
      long r = 0;
      if (rows - m >= 4) { RUN_WHOLE(4, 2) RUN_WHOLE(4, 1) m += 4; }
      else if (rows - m >= 2) { RUN_WHOLE(2, 4) RUN_WHOLE(2, 1) m += 2; }
      else { RUN_WHOLE(1, 6) RUN_WHOLE(1, 1) m += 1; }
    }
  }
  free(steps);
  return 0;
}

void rows_linear(const linear_t *by, const float *x, float *y, int64_t rows, int threads) {
  if (by->outputs * by->width < SPREAD) threads = 1;
  if (by->whole && !product_whole(x, by->weight, by->scale, by->bias, y, rows, by->outputs, by->width, threads)) return;
  if (by->scale)
    product_i8(x, by->weight, by->scale, by->bias, y, rows, by->outputs, by->width, threads);
  else
    product_f32(x, by->weight, 0, by->bias, y, rows, by->outputs, by->width, threads);
}

/* ---- a stack of pre-norm blocks ---- */

typedef struct {
  const float *norm1_weight, *norm1_bias, *norm2_weight, *norm2_bias; /* (D) or 0 */
  const float *query_weight, *query_bias, *key_weight, *key_bias;     /* (d) or 0 */
  const float *log_scale, *scale1, *scale2;                           /* (h), (D), (D) or 0 */
  linear_t qkv, out, up, down;
} block_t;

typedef struct {
  int64_t width, heads, kv_heads, head, hidden, depth;
  int64_t centred;  /* LayerNorm, not RMSNorm */
  int64_t mlp;      /* 0 swiglu, 1 geglu, 2 gelu, 3 gelu_tanh, 4 silu */
  int64_t qk_norm;  /* 0 none, 1 unit length and a learned scale, 2 LayerNorm, 3 RMSNorm */
  int64_t halves;   /* rotary pairs (j, j + d / 2), not neighbours */
  float eps, scale; /* of the norms; of the softmax */
} shape_t;

typedef struct {
  float *x;                 /* (B, n, D), changed in place */
  const float *cos, *sin;   /* (n, d / 2) or 0 */
  const uint8_t *mask;      /* (1 or B, n, L) or 0 */
  float *const *keys, *const *values; /* one buffer (B, h, capacity, d) a block */
  float *taps;              /* (T, B, n, D): x behind the blocks of `tapped`, each through its own last norm */
  const int64_t *tapped;    /* (T) */
  const float *const *last; /* (T, 2) weights and biases of the last norms, or 0 for none */
  int64_t batch, rows, start, capacity, masks, count;
} call_t;

static inline float dot(const float *a, const float *b, long width) {
  v8 sum = (v8){0}, more = (v8){0};
  long i = 0;
  for (; i + 16 <= width; i += 16) {
    sum += load_f32(a + i) * load_f32(b + i);
    more += load_f32(a + i + 8) * load_f32(b + i + 8);
  }
  for (; i + 8 <= width; i += 8) sum += load_f32(a + i) * load_f32(b + i);
  float found = total(sum + more);
  for (; i < width; i++) found += a[i] * b[i];
  return found;
}

static void norm(const float *x, float *y, const float *weight, const float *bias, long width, int centred, float eps) {
  float mean = 0;
  if (centred)
    for (long i = 0; i < width; i++) mean += x[i];
  mean /= width;
  for (long i = 0; i < width; i++) y[i] = x[i] - mean;
  float factor = 1.0f / sqrtf(dot(y, y, width) / width + eps);
  for (long i = 0; i < width; i++) y[i] = weight ? y[i] * factor * weight[i] + (bias ? bias[i] : 0) : y[i] * factor;
}

static void norm_rows(const float *x, float *y, const float *weight, const float *bias, long rows, const shape_t *s) {
  for (long r = 0; r < rows; r++) norm(x + r * s->width, y + r * s->width, weight, bias, s->width, s->centred, s->eps);
}

static void unit(float *x, float factor, long width) {
  float length = sqrtf(dot(x, x, width));
  factor /= length > 1e-12f ? length : 1e-12f;
  for (long i = 0; i < width; i++) x[i] *= factor;
}

static void turn(float *x, const float *cos, const float *sin, long half, int halves) {
  long step = halves ? 1 : 2, other = halves ? half : 1;
  for (long i = 0; i < half; i++) {
    float a = x[i * step], b = x[i * step + other];
    x[i * step] = a * cos[i] - b * sin[i];
    x[i * step + other] = b * cos[i] + a * sin[i];
  }
}

/* One query over L keys (L, d); `scores` is scratch (L + 8). */
static void attend(const float *query, const float *keys, const float *values, const uint8_t *mask, float *out,
                   float *scores, long length, long size, float scale) {
  float best = -INFINITY;
  for (long l = 0; l < length; l++) {
    scores[l] = mask && !mask[l] ? -INFINITY : dot(query, keys + l * size, size) * scale;
    best = scores[l] > best ? scores[l] : best;
  }
  for (long l = length; l < length + 8; l++) scores[l] = -INFINITY;
  v8 sums = (v8){0};
  for (long l = 0; l < length; l += 8) {
    v8 seen = load_f32(scores + l), weights = pick(seen == -INFINITY, all(0), exp8(seen - best));
    sums += weights;
    store(scores + l, weights);
  }
  float factor = 1.0f / total(sums);
  long i = 0;
  for (; i + 32 <= size; i += 32) {
    v8 mixed[4] = {{0}, {0}, {0}, {0}};
    for (long l = 0; l < length; l++)
      for (int j = 0; j < 4; j++) mixed[j] += load_f32(values + l * size + i + 8 * j) * scores[l];
    for (int j = 0; j < 4; j++) store(out + i + 8 * j, mixed[j] * factor);
  }
  for (; i + 8 <= size; i += 8) {
    v8 mixed = (v8){0};
    for (long l = 0; l < length; l++) mixed += load_f32(values + l * size + i) * scores[l];
    store(out + i, mixed * factor);
  }
  for (; i < size; i++) {
    float mixed = 0;
    for (long l = 0; l < length; l++) mixed += values[l * size + i] * scores[l];
    out[i] = mixed * factor;
  }
}

/* Queries, keys and values of all rows: normalised, turned, keys and values written to their buffers. */
static void place(const shape_t *s, const block_t *b, const call_t *c, float *qkv, float *keys, float *values) {
  long size = s->head, inner = s->heads * size, kv = s->kv_heads * size, wide = inner + 2 * kv;
  for (long r = 0; r < c->batch * c->rows; r++) {
    float *row = qkv + r * wide;
    long sample = r / c->rows, place = r % c->rows;
    for (long h = 0; h < s->heads + s->kv_heads; h++) {
      float *part = row + h * size;
      int query = h < s->heads;
      const float *weight = query ? b->query_weight : b->key_weight, *bias = query ? b->query_bias : b->key_bias;
      if (s->qk_norm == 1)
        unit(part, query ? expf(fminf(b->log_scale[h], 4.605170185988092f)) : 1.0f, size);
      else if (s->qk_norm)
        norm(part, part, weight, bias, size, s->qk_norm == 2, s->eps);
      if (c->cos) turn(part, c->cos + place * (size / 2), c->sin + place * (size / 2), size / 2, s->halves);
    }
    for (long g = 0; g < s->kv_heads; g++) {
      long at = ((sample * s->kv_heads + g) * c->capacity + c->start + place) * size;
      memcpy(keys + at, row + inner + g * size, size * sizeof(float));
      memcpy(values + at, row + inner + kv + g * size, size * sizeof(float));
    }
  }
}

static void activate(const shape_t *s, float *up, float *hidden, long rows) {
  long width = s->hidden, wide = s->mlp < 2 ? 2 * width : width;
  for (long r = 0; r < rows; r++) {
    float *gate = up + r * wide, *to = hidden + r * width;
    long i = 0;
    if (s->mlp == 0 || s->mlp == 4)
      for (; i + 8 <= width; i += 8) {
        v8 value = load_f32(gate + i), result = value / (1.0f + exp8(-value));
        store(to + i, s->mlp ? result : result * load_f32(gate + width + i));
      }
    for (; i < width; i++) {
      float value = gate[i], result;
      if (s->mlp == 0 || s->mlp == 4)
        result = value / (1.0f + expf(-value));
      else if (s->mlp == 3)
        result = 0.5f * value * (1.0f + tanhf(0.7978845608028654f * (value + 0.044715f * value * value * value)));
      else
        result = 0.5f * value * (1.0f + erff(value * 0.7071067811865476f));
      to[i] = s->mlp < 2 ? result * gate[width + i] : result;
    }
  }
}

static void add(float *x, const float *y, const float *scale, long rows, long width) {
  for (long r = 0; r < rows; r++)
    for (long i = 0; i < width; i++) x[r * width + i] += scale ? y[r * width + i] * scale[i] : y[r * width + i];
}

/* Runs all blocks; 0, or 1 where there is no memory. */
int rows_stack(const shape_t *s, const block_t *blocks, const call_t *c, int threads) {
  long rows = c->batch * c->rows, size = s->head, inner = s->heads * size, wide = inner + 2 * s->kv_heads * size;
  long up = s->mlp < 2 ? 2 * s->hidden : s->hidden, length = c->start + c->rows, each = length + 8;
  long most = wide > up ? wide : up, next = inner > s->hidden ? inner : s->hidden;
  next = next > s->width ? next : s->width;
  float *work = malloc(sizeof(float) * (rows * (s->width + most + next) + rows * s->heads * each));
  if (!work) return 1;
  float *normed = work, *first = normed + rows * s->width, *second = first + rows * most, *scores = second + rows * next;
  int attending = rows * s->heads * length * size < SPREAD ? 1 : threads;
  for (long layer = 0; layer < s->depth; layer++) {
    const block_t *b = blocks + layer;
    float *keys = c->keys[layer], *values = c->values[layer];
    norm_rows(c->x, normed, b->norm1_weight, b->norm1_bias, rows, s);
    rows_linear(&b->qkv, normed, first, rows, threads);
    place(s, b, c, first, keys, values);
    {
      int threads = attending;
      PARALLEL
      for (long item = 0; item < rows * s->heads; item++) {
        long r = item / s->heads, h = item % s->heads, sample = r / c->rows;
        long at = (sample * s->kv_heads + h / (s->heads / s->kv_heads)) * c->capacity * size;
        const uint8_t *mask = c->mask ? c->mask + ((c->masks == 1 ? 0 : sample) * c->rows + r % c->rows) * length : 0;
        attend(first + r * wide + h * size, keys + at, values + at, mask, second + r * inner + h * size,
               scores + item * each, length, size, s->scale);
      }
    }
    rows_linear(&b->out, second, normed, rows, threads);
    add(c->x, normed, b->scale1, rows, s->width);
    norm_rows(c->x, normed, b->norm2_weight, b->norm2_bias, rows, s);
    rows_linear(&b->up, normed, first, rows, threads);
    activate(s, first, second, rows);
    rows_linear(&b->down, second, normed, rows, threads);
    add(c->x, normed, b->scale2, rows, s->width);
    for (int64_t tap = 0; tap < c->count; tap++) {
      float *to = c->taps + rows * s->width * tap;
      if (c->tapped[tap] != layer + 1) continue;
      if (c->last)
        norm_rows(c->x, to, c->last[2 * tap], c->last[2 * tap + 1], rows, s);
      else
        memcpy(to, c->x, sizeof(float) * rows * s->width);
    }
  }
  free(work);
  return 0;
}

/* ---- codes of logits: top-k and Gumbel noise, as in tokenloom.rng and tokenloom.generators.sampling ---- */

static inline uint32_t mix(uint32_t word) {
  word ^= word >> 16;
  word *= 0x85EBCA6Bu;
  word ^= word >> 13;
  word *= 0xC2B2AE35u;
  return word ^ word >> 16;
}

static uint32_t hash_row(uint64_t seed, uint32_t position, uint32_t chain) {
  uint32_t word = mix(((uint32_t)seed ^ chain) + 0x9E3779B9u) ^ (uint32_t)(seed >> 32);
  word = mix(word + 0x9E3779B9u) ^ position;
  return mix(word + 0x9E3779B9u);
}

/* The k-th largest of `count` values, which are reordered. */
static float kth(float *values, long count, long k) {
  long low = 0, high = count - 1, want = k - 1;
  while (low < high) {
    float pivot = values[low + (high - low) / 2];
    long i = low, j = high;
    while (i <= j) {
      while (values[i] > pivot) i++;
      while (values[j] < pivot) j--;
      if (i <= j) {
        float held = values[i];
        values[i++] = values[j];
        values[j--] = held;
      }
    }
    if (want <= j) high = j;
    else if (want >= i) low = i;
    else break;
  }
  return values[want];
}

/* ids (rows) of logits (rows, V) with a seed and a position a row; 0, 1 without memory, 2 for logits that are unusable. */
int rows_draw(const float *logits, const int64_t *seeds, const int64_t *positions, int64_t *ids, int64_t rows,
              int64_t vocabulary, int64_t top_k, float temperature) {
  int limited = 0 < top_k && top_k < vocabulary;
  float *copy = limited ? malloc(sizeof(float) * vocabulary) : 0;
  if (limited && !copy) return 1;
  int failed = 0;
  for (int64_t r = 0; r < rows && !failed; r++) {
    const float *row = logits + r * vocabulary;
    float best = -INFINITY, threshold = -INFINITY, most = -INFINITY;
    for (int64_t v = 0; v < vocabulary; v++) {
      if (row[v] > best) best = row[v];
      if (row[v] != row[v]) failed = 2;
    }
    if (!isfinite(best)) failed = 2;
    if (failed) break;
    if (limited) {
      memcpy(copy, row, sizeof(float) * vocabulary);
      threshold = kth(copy, vocabulary, top_k);
    }
    uint32_t offset = hash_row(seeds[r], positions[r], 0x243F6A88u);
    uint32_t factor = hash_row(seeds[r], positions[r], 0x85A308D3u) | 1;
    ids[r] = 0;
    for (int64_t v = 0; v < vocabulary; v++) {
      if (row[v] < threshold || row[v] == -INFINITY) continue;
      int32_t word = (int32_t)mix((uint32_t)v * factor + offset);
      double uniform = ((double)word + 2147483648.5) * 0x1p-32;
      float value = (float)-log(-log(uniform)) + (row[v] - best) / temperature;
      if (value > most) {
        most = value;
        ids[r] = v;
      }
    }
  }
  free(copy);
  return failed;
}
