/* Two passes over a weight W on a CPU that decode it as they go, M = (W != 0):
 *
 *   merge   T = W + M (.) (B A), B already scaled; reads W and writes T once
 *   mask    T = M (.) T in place, and how many weights of each row are not zero
 *
 * A tile of ROWS x COLUMNS sums of B A is kept in registers: GCC's vector types say so in portable C. Then each of its
 * rows is decoded from W into a small buffer, added under the mask, rounded once and written. Layouts of W, see layout.py:
 *
 *   LAYOUT_DENSE     values[row * stride + column]
 *   LAYOUT_BITMAP    bit k of places[row * pitch + j]: whether column 8 j + k is stored; values from offsets[row] on
 *   LAYOUT_GROUPS    n values of every m columns, the column of each in BITS bits of places, the first in the lowest
 *
 * r = 0 only decodes, into the type of the values. native.py compiles and calls this file, cuts A into panels of
 * COLUMNS and fills A and B up with zeros, so that every product is a whole one.
 */

#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#define ROWS 4
#define VECTORS 4
#define COLUMNS 64 /* of a tile: a multiple of 16, so that groups of 2, 4, 8 and 16 never lie across tiles */
#define PARTS (COLUMNS / LANES / VECTORS)

typedef float vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

enum { LAYOUT_DENSE, LAYOUT_BITMAP, LAYOUT_GROUPS };

typedef struct {
    const void *values;
    const uint8_t *places;
    const int64_t *offsets;
    const float *panels; /* A, [ceil(width / COLUMNS)][r][COLUMNS] */
    const float *B;      /* [height rounded up to ROWS][r] */
    void *T;             /* [height][width] */
    float *counts;       /* of mask: [height] */
    int64_t height, width, r;
    int64_t stored; /* values in all */
    int64_t stride; /* values of a row, dense and n:m */
    int64_t pitch;  /* bytes of places of a row */
    int32_t layout, n, m, bits;
    int32_t values_are_bfloat16, T_is_bfloat16;
    int32_t threads;
} problem;

static inline float of_bfloat16(uint16_t x)
{
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

/* The way back, bit for bit. */
static inline uint16_t upper_half(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits >> 16;
}

/* To the nearest, ties to even; a NaN stays one, and quiet. */
static inline uint16_t to_bfloat16(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded;
}

/* The sums of ROWS rows of B with a panel of A. */
static inline void product(const float *B, const float *panel, int64_t r, float out[ROWS][COLUMNS])
{
    for (int part = 0; part < PARTS; part++) {
        vector sums[ROWS][VECTORS] = {};
        for (int64_t k = 0; k < r; k++) {
            const vector *a = (const vector *)(panel + k * COLUMNS) + part * VECTORS;
#pragma GCC unroll 4
            for (int row = 0; row < ROWS; row++) {
                const float b = B[row * r + k];
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++)
                    sums[row][v] += b * a[v];
            }
        }
#pragma GCC unroll 4
        for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++)
                *((vector *)out[row] + part * VECTORS + v) = sums[row][v];
    }
}

/* Eight weights at once: the values that follow one another in memory are shuffled to their columns; index 8 is zero.
 * Clang has no shuffle by a variable, and takes the loops. */
#if defined(__GNUC__) && !defined(__clang__)
#define SHUFFLES 1
typedef float floats __attribute__((vector_size(32), aligned(4)));
typedef int32_t float_indices __attribute__((vector_size(32)));
typedef uint16_t halves __attribute__((vector_size(16), aligned(2)));
typedef uint16_t half_indices __attribute__((vector_size(16)));
static half_indices of_bits[256], of_codes[256]; /* of a byte of a bitmap; of a byte of 2:4 codes, two groups */

__attribute__((constructor)) static void fill_tables(void)
{
    for (int byte = 0; byte < 256; byte++) {
        int number = 0;
        for (int k = 0; k < 8; k++)
            of_bits[byte][k] = byte >> k & 1 ? number++ : 8;
        for (int k = 0; k < 8; k++)
            of_codes[byte][k] = 8;
        for (int k = 0; k < 4; k++)
            of_codes[byte][k / 2 * 4 + (byte >> 2 * k & 3)] = k;
    }
}

static inline void shuffle_float32(const float *from, half_indices indices, float *W)
{
    floats values;
    memcpy(&values, from, sizeof values);
    values = __builtin_shuffle(values, (floats){}, __builtin_convertvector(indices, float_indices));
    memcpy(W, &values, sizeof values);
}

static inline void shuffle_bfloat16(const uint16_t *from, half_indices indices, float *W)
{
    halves values;
    memcpy(&values, from, sizeof values);
    values = __builtin_shuffle(values, (halves){}, (halves)indices);
    float_indices bits = __builtin_convertvector(values, float_indices) << 16;
    memcpy(W, &bits, sizeof bits);
}
#else
#define SHUFFLES 0
#define shuffle_float32(from, indices, W)
#define shuffle_bfloat16(from, indices, W)
#endif

/* Columns [start, start + count) of a row of W; `number` values of the row came before them in a bitmap. */
#define DEFINE_DECODE(TYPE, NAME, TO_FLOAT)                                                                      \
    static inline int64_t decode_##NAME(const problem *p, int64_t row, int64_t start, int count, int64_t number, \
                                        float *W)                                                                \
    {                                                                                                            \
        const TYPE *values = (const TYPE *)p->values;                                                            \
        if (p->layout == LAYOUT_DENSE) {                                                                         \
            const TYPE *from = values + row * p->stride + start;                                                 \
            for (int j = 0; j < count; j++)                                                                      \
                W[j] = TO_FLOAT(from[j]);                                                                        \
        } else if (p->layout == LAYOUT_BITMAP) {                                                                 \
            const uint8_t *bits = p->places + row * p->pitch + start / 8;                                        \
            const TYPE *from = values + p->offsets[row];                                                         \
            const int64_t left = p->stored - p->offsets[row]; /* from here to the end of all values */           \
            for (int j = 0; j < count; j += 8) {                                                                 \
                const uint32_t byte = bits[j / 8];                                                               \
                if (SHUFFLES && number + 8 <= left) {                                                            \
                    shuffle_##NAME(from + number, of_bits[byte], W + j);                                         \
                    number += __builtin_popcount(byte);                                                          \
                } else                                                                                           \
                    for (int k = 0; k < 8; k++)                                                                  \
                        W[j + k] = byte >> k & 1 ? TO_FLOAT(from[number++]) : 0.0f;                              \
            }                                                                                                    \
        } else {                                                                                                 \
            const uint8_t *codes = p->places + row * p->pitch;                                                   \
            const int64_t first = start / p->m * p->n, begin = row * p->stride;                                  \
            const int stored = count / p->m * p->n;                                                              \
            int t = 0;                                                                                           \
            if (SHUFFLES && p->n == 2 && p->m == 4)                                                              \
                for (; t + 4 <= stored && begin + first + t + 8 <= p->stored; t += 4)                            \
                    shuffle_##NAME(values + begin + first + t, of_codes[codes[(first + t) / 4]], W + 2 * t);     \
            memset(W + t / p->n * p->m, 0, (COLUMNS - t / p->n * p->m) * sizeof(float));                         \
            for (; t < stored; t++) {                                                                            \
                const int64_t bit = (first + t) * p->bits;                                                       \
                const int column = codes[bit / 8] >> (bit % 8) & ((1 << p->bits) - 1);                           \
                W[t / p->n * p->m + column] = TO_FLOAT(values[begin + first + t]);                               \
            }                                                                                                    \
        }                                                                                                        \
        return number;                                                                                           \
    }

#define SAME(x) (x)
DEFINE_DECODE(float, float32, SAME)
DEFINE_DECODE(uint16_t, bfloat16, of_bfloat16)

void merge(const problem *p)
{
    const int64_t width = p->width, r = p->r;
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (int64_t top = 0; top < p->height; top += ROWS) {
        const int rows = p->height - top < ROWS ? (int)(p->height - top) : ROWS;
        int64_t numbers[ROWS] = {0};
        float sums[ROWS][COLUMNS] __attribute__((aligned(64))), W[COLUMNS] __attribute__((aligned(64)));
        memset(sums, 0, sizeof sums);
        for (int64_t start = 0; start < width; start += COLUMNS) {
            const int count = width - start < COLUMNS ? (int)(width - start) : COLUMNS;
            if (r)
                product(p->B + top * r, p->panels + start * r, r, sums);
            for (int row = 0; row < rows; row++) {
                const int64_t at = (top + row) * width + start;
                numbers[row] = p->values_are_bfloat16
                                   ? decode_bfloat16(p, top + row, start, count, numbers[row], W)
                                   : decode_float32(p, top + row, start, count, numbers[row], W);
                if (r)
                    for (int j = 0; j < count; j++)
                        W[j] = W[j] != 0.0f ? W[j] + sums[row][j] : 0.0f;
                if (p->T_is_bfloat16)
                    for (int j = 0; j < count; j++)
                        ((uint16_t *)p->T)[at + j] = r ? to_bfloat16(W[j]) : upper_half(W[j]);
                else
                    memcpy((float *)p->T + at, W, count * sizeof(float));
            }
        }
    }
}

void mask(const problem *p)
{
    const int64_t width = p->width;
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (int64_t row = 0; row < p->height; row++) {
        int64_t number = 0, nonzero = 0;
        float W[COLUMNS] __attribute__((aligned(64)));
        for (int64_t start = 0; start < width; start += COLUMNS) {
            const int count = width - start < COLUMNS ? (int)(width - start) : COLUMNS;
            const int64_t at = row * width + start;
            int32_t keep[COLUMNS], kept = 0;
            number = p->values_are_bfloat16 ? decode_bfloat16(p, row, start, count, number, W)
                                            : decode_float32(p, row, start, count, number, W);
            for (int j = 0; j < count; j++) {
                keep[j] = -(W[j] != 0.0f);
                kept -= keep[j];
            }
            nonzero += kept;
            if (p->T_is_bfloat16)
                for (int j = 0; j < count; j++)
                    ((uint16_t *)p->T)[at + j] &= (uint16_t)keep[j];
            else
                for (int j = 0; j < count; j++)
                    ((uint32_t *)p->T)[at + j] &= (uint32_t)keep[j];
        }
        p->counts[row] = (float)nonzero;
    }
}
