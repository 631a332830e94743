/* Squares of products, added up: score += the sum over b of (left_b' right_b)^2. A product is formed a tile at a time,
   and a tile is squared in the registers that it was formed in. */
#include "exported.h"

#include <string.h>

/* left [examples, terms, rows], right [examples, terms, columns] and score [rows, columns], whose last axes are dense;
   how far apart examples and terms lie, in entries. room holds left, then a panel of right and a panel of sums:
   (examples * terms + 48) * (rows, up to a multiple of 8) + 48 * terms entries. */
typedef struct {
    const float *left, *right;
    float *score, *room;
    int64_t examples, terms, rows, columns;
    int64_t left_example, left_term, right_example, right_term;
} ct_products;

#if defined(__x86_64__) && defined(__GNUC__)
/* sums [rows, 3 * lanes] += (left' right)^2 for left [terms, rows] and right [terms, 3 * lanes]. */
#define ADD_TILE(name, features, lanes, rows)                                                              \
    __attribute__((target(features))) static void name(float *sums, const float *left, const float *right, \
                                                       int64_t terms) {                                    \
        typedef float vec __attribute__((vector_size(4 * lanes), aligned(4), may_alias));                  \
        vec tile[rows][3] = {0}, *out = (vec *)sums;                                                       \
        for (int64_t t = 0; t < terms; t++, left += rows, right += 3 * lanes) {                            \
            const vec in[3] = {((vec *)right)[0], ((vec *)right)[1], ((vec *)right)[2]};                   \
            _Pragma("GCC unroll 8") for (int m = 0; m < rows; m++)                                         \
                _Pragma("GCC unroll 3") for (int i = 0; i < 3; i++) tile[m][i] += left[m] * in[i];         \
        }                                                                                                  \
        _Pragma("GCC unroll 8") for (int m = 0; m < rows; m++)                                             \
            _Pragma("GCC unroll 3") for (int i = 0; i < 3; i++) out[3 * m + i] += tile[m][i] * tile[m][i]; \
    }
ADD_TILE(add_by_eight, "avx2,fma", 8, 4)
ADD_TILE(add_by_sixteen, "avx512f", 16, 8)

/* Copy [terms, n] to [terms, width], filled up with zeros. */
INLINE void pack(float *to, const float *from, int64_t terms, int64_t term, int64_t n, const int64_t width) {
    for (int64_t t = 0; t < terms; t++, to += width, from += term) {
        if (n >= width) {
            memcpy(to, from, 4 * width);
        } else {
            memset(to, 0, 4 * width);
            memcpy(to, from, 4 * n);
        }
    }
}

/* For tiles [M, N]. */
INLINE void add_squares(const ct_products *p, const int64_t M, const int64_t N,
                        void (*add_tile)(float *, const float *, const float *, int64_t)) {
    const int64_t T = p->terms, strips = (p->rows + M - 1) / M;
    float *left = p->room, *right = left + p->examples * strips * M * T, *sums = right + T * N;
    for (int64_t k = 0; k < p->examples * strips; k++) {
        const int64_t b = k / strips, m = k % strips * M;
        pack(left + k * T * M, p->left + b * p->left_example + m, T, p->left_term, p->rows - m, M);
    }
    for (int64_t j = 0; j < p->columns; j += N) {
        const int64_t n = p->columns - j < N ? p->columns - j : N;
        memset(sums, 0, 4 * strips * M * N);
        for (int64_t b = 0; b < p->examples; b++) {
            pack(right, p->right + b * p->right_example + j, T, p->right_term, n, N);
            for (int64_t i = 0; i < strips; i++)
                add_tile(sums + i * M * N, left + (b * strips + i) * T * M, right, T);
        }
        for (int64_t m = 0; m < p->rows; m++)
            for (int64_t k = 0; k < n; k++) p->score[m * p->columns + j + k] += sums[m * N + k];
    }
}

/* Whether this processor has what the tiles need. */
EXPORT int ct_adds_squares(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

EXPORT void ct_add_squares(const ct_products *p) {
    if (__builtin_cpu_supports("avx512f"))
        add_squares(p, 8, 48, add_by_sixteen);
    else
        add_squares(p, 4, 24, add_by_eight);
}
#else
EXPORT int ct_adds_squares(void) { return 0; }
EXPORT void ct_add_squares(const ct_products *task) { (void)task; }
#endif
