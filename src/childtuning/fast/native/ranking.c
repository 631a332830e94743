/* Finding and collecting the largest of many float32 scores; sign -1 finds the smallest. */
#include "exported.h"

#include <stdint.h>

typedef struct {
    int64_t above, at_high, at_low, not_numbers, between;
} ct_bracketed;

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define EIGHT __attribute__((target("avx2,bmi2,popcnt")))

static int has_eight(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2"); }

/* The places of the set bits of 8, a lane each, from the first lane on. */
static inline EIGHT __m256i places(uint32_t mask) {
    const uint64_t nibbles = _pdep_u64(mask, 0x11111111ull) * 0xF;
    const uint64_t packed = _pext_u64(0x76543210ull, nibbles);
    return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)_pdep_u64(packed, 0x0F0F0F0F0F0F0F0Full)));
}

static inline EIGHT int64_t total(__m256i negative_counts) {
    int32_t lanes[8];
    int64_t sum = 0;
    _mm256_storeu_si256((__m256i *)lanes, negative_counts);
    for (int i = 0; i < 8; i++) sum -= lanes[i];
    return sum;
}

static EIGHT int64_t bracket_by_eight(const float *scores, int64_t n, float sign, float low, float high, float *between,
                                      int64_t room, ct_bracketed *found) {
    const __m256 lows = _mm256_set1_ps(low), highs = _mm256_set1_ps(high), factor = _mm256_set1_ps(sign);
    __m256i above = _mm256_setzero_si256(), at_high = above, at_low = above, not_numbers = above;
    int64_t i = 0, k = 0;
    for (; i + 8 <= n && k + 8 <= room; i += 8) {
        const __m256 s = _mm256_mul_ps(_mm256_loadu_ps(scores + i), factor);
        above = _mm256_add_epi32(above, _mm256_castps_si256(_mm256_cmp_ps(s, highs, _CMP_GT_OQ)));
        at_high = _mm256_add_epi32(at_high, _mm256_castps_si256(_mm256_cmp_ps(s, highs, _CMP_EQ_OQ)));
        at_low = _mm256_add_epi32(at_low, _mm256_castps_si256(_mm256_cmp_ps(s, lows, _CMP_EQ_OQ)));
        not_numbers = _mm256_add_epi32(not_numbers, _mm256_castps_si256(_mm256_cmp_ps(s, s, _CMP_UNORD_Q)));
        const __m256 within = _mm256_and_ps(_mm256_cmp_ps(s, lows, _CMP_GT_OQ), _mm256_cmp_ps(s, highs, _CMP_LT_OQ));
        const uint32_t mask = (uint32_t)_mm256_movemask_ps(within);
        if (!mask) continue;
        _mm256_storeu_ps(between + k, _mm256_permutevar8x32_ps(s, places(mask)));
        k += __builtin_popcount(mask);
    }
    found->above = total(above), found->at_high = total(at_high), found->at_low = total(at_low);
    found->not_numbers = total(not_numbers), found->between = k;
    return i;
}

static EIGHT int64_t collect_by_eight(const float *scores, int64_t n, float sign, float threshold, int32_t base,
                                      int64_t count, int32_t *out, int64_t *found) {
    const __m256 limit = _mm256_set1_ps(threshold), factor = _mm256_set1_ps(sign);
    const __m256i ascending = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    int64_t i = 0, k = 0;
    for (; i + 8 <= n && k + 8 <= count; i += 8) {
        const __m256 s = _mm256_mul_ps(_mm256_loadu_ps(scores + i), factor);
        const uint32_t mask = (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(s, limit, _CMP_GT_OQ));
        const __m256i index = _mm256_add_epi32(_mm256_set1_epi32(base + (int32_t)i), ascending);
        _mm256_storeu_si256((__m256i *)(out + k), _mm256_permutevar8x32_epi32(index, places(mask)));
        k += __builtin_popcount(mask);
    }
    *found = k;
    return i;
}
#else
static int has_eight(void) { return 0; }

static int64_t bracket_by_eight(const float *scores, int64_t n, float sign, float low, float high, float *between,
                                int64_t room, ct_bracketed *found) {
    (void)scores, (void)n, (void)sign, (void)low, (void)high, (void)between, (void)room, (void)found;
    return 0;
}

static int64_t collect_by_eight(const float *scores, int64_t n, float sign, float threshold, int32_t base, int64_t count,
                                int32_t *out, int64_t *found) {
    (void)scores, (void)n, (void)sign, (void)threshold, (void)base, (void)count, (void)out, (void)found;
    return 0;
}
#endif

/* Copy one score of every step, at a place within the step that has no pattern. */
EXPORT void ct_sample(const float *scores, int64_t count, int64_t step, float sign, float *out) {
    uint64_t state = 0x9E3779B97F4A7C15ull;
    for (int64_t i = 0; i < count; i++) {
        state = state * 6364136223846793005ull + 1442695040888963407ull;
        out[i] = sign * scores[i * step + (int64_t)((state >> 33) % (uint64_t)step)];
    }
}

/* Count the scores above high, at high, at low, and those that are NaN; list those between, of which found counts one
   more than there is room for where there is not enough. */
EXPORT void ct_bracket(const float *scores, int64_t n, float sign, float low, float high, ct_bracketed *found,
                       float *between, int64_t room) {
    ct_bracketed f = {0, 0, 0, 0, 0};
    int64_t i = has_eight() ? bracket_by_eight(scores, n, sign, low, high, between, room, &f) : 0;
    for (; i < n; i++) {
        const float s = sign * scores[i];
        f.above += s > high;
        f.at_high += s == high;
        f.at_low += s == low;
        f.not_numbers += s != s;
        if (s > low && s < high) {
            if (f.between == room) {
                f.between++;
                break;
            }
            between[f.between++] = s;
        }
    }
    if (low == high) f.at_low = 0;
    *found = f;
}

/* List offset + i of the scores above the threshold and of the first ties at it: exactly count, which is the number
   to be had. */
EXPORT void ct_collect(const float *scores, int64_t n, float sign, float threshold, int64_t ties, int64_t offset,
                       int64_t count, int32_t *out) {
    int64_t k = 0, i = 0;
    for (; i < n && k < count && ties; i++) {
        const float s = sign * scores[i];
        out[k] = (int32_t)(offset + i);
        k += s >= threshold;
        ties -= s == threshold;
    }
    if (has_eight()) {
        int64_t found = 0;
        i += collect_by_eight(scores + i, n - i, sign, threshold, (int32_t)(offset + i), count - k, out + k, &found);
        k += found;
    }
    for (; i < n && k < count; i++) {
        out[k] = (int32_t)(offset + i);
        k += sign * scores[i] > threshold;
    }
}
