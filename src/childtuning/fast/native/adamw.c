/* AdamW steps of a child, one pass over memory: gradient in, weight and moments out. */
#include "exported.h"
#include "philox.h"

#include <math.h>

#define GATHERED 32 /* entries gathered at a time: more measured slower */
#define AHEAD 64    /* indices looked ahead of the gather */

typedef struct {
    float lr_decay;   /* decoupled: 1 - lr * weight_decay, else 1 */
    float l2;         /* not decoupled: weight_decay, else 0 */
    float rate1;      /* 1 - beta1 */
    float beta2, rate2; /* beta2, 1 - beta2 */
    float eps;
    float step_size;  /* lr / (1 - beta1^t) */
    float inv_sqrt_correction; /* 1 / sqrt(1 - beta2^t) */
    float scale;      /* what the gradient is multiplied with */
} ct_adamw;

/* Some of one parameter's trained entries: count units of width entries that lie together, unit i at index[i] * width,
   and the same again a period further, repeats times in all. A compact gradient lies in the order of the moments; a
   dense one as the weight does. */
typedef struct {
    float *weight;
    const float *gradient;
    float *first, *second;
    const int32_t *index;
    int64_t count, width;
    int64_t repeats, period;
    int64_t compact_gradient;
    const ct_adamw *numbers;
} ct_stretch;

/* Entries start ... start + count - 1 of a parameter under a mask of single entries; the parameter's first entry is
   entry mask_start of the mask: a shard's is not 0. */
typedef struct {
    float *weight;
    const float *gradient;
    float *first, *second;
    int64_t start, count, mask_start;
    const ct_draw *draw;
    const ct_adamw *numbers;
} ct_masked;

/* Rows start ... start + count - 1 of a parameter, of width entries each; row r has the gradient at
   gradient + place[r] * width, or none where place[r] is negative. */
typedef struct {
    float *weight;
    const float *gradient;
    float *first, *second;
    int64_t start, count, width;
    const int32_t *place;
    const ct_adamw *numbers;
} ct_rows;

INLINE void update_with(float *restrict w, const float *restrict g, float *restrict m, float *restrict v, int64_t n,
                        const ct_adamw h, const float l2) {
    for (int64_t i = 0; i < n; i++) {
        const float grad = g[i] * h.scale + l2 * w[i];
        const float first = m[i] + (grad - m[i]) * h.rate1;
        const float second = v[i] * h.beta2 + grad * grad * h.rate2;
        m[i] = first;
        v[i] = second;
        w[i] = w[i] * h.lr_decay - h.step_size * first / (sqrtf(second) * h.inv_sqrt_correction + h.eps);
    }
}

INLINE void update(float *w, const float *g, float *m, float *v, int64_t n, const ct_adamw h) {
    if (h.l2 == 0.0f)
        update_with(w, g, m, v, n, h, 0.0f);
    else
        update_with(w, g, m, v, n, h, h.l2);
}

INLINE void update_at(const ct_stretch *s, const ct_adamw h) {
    float weights[GATHERED], gradients[GATHERED];
    for (int64_t start = 0; start < s->count; start += GATHERED) {
        const int64_t n = s->count - start < GATHERED ? s->count - start : GATHERED;
        const int32_t *at = s->index + start;
        for (int64_t i = 0; i < n; i++) {
            const int64_t next = start + i + AHEAD < s->count ? i + AHEAD : i;
            __builtin_prefetch(s->weight + at[next], 1);
            weights[i] = s->weight[at[i]];
        }
        const float *g = s->gradient + start;
        if (!s->compact_gradient) {
            for (int64_t i = 0; i < n; i++) {
                const int64_t next = start + i + AHEAD < s->count ? i + AHEAD : i;
                __builtin_prefetch(s->gradient + at[next], 0);
                gradients[i] = s->gradient[at[i]];
            }
            g = gradients;
        }
        update(weights, g, s->first + start, s->second + start, n, h);
        for (int64_t i = 0; i < n; i++) s->weight[at[i]] = weights[i];
    }
}

INLINE void update_once(const ct_stretch *s, const ct_adamw h) {
    if (s->width == 1) {
        update_at(s, h);
        return;
    }
    for (int64_t i = 0; i < s->count; i++) {
        const int64_t at = s->index[i] * s->width, place = i * s->width;
        const float *g = s->gradient + (s->compact_gradient ? place : at);
        update(s->weight + at, g, s->first + place, s->second + place, s->width, h);
    }
}

/* Update the entries of a stretch. */
EXPORT CLONES void ct_adamw_stretch(const ct_stretch *task) {
    ct_stretch s = *task;
    const ct_adamw h = *s.numbers;
    const int64_t once = s.count * s.width;
    for (int64_t r = 0; r < s.repeats; r++) {
        update_once(&s, h);
        s.weight += s.period;
        s.gradient += s.compact_gradient ? once : s.period;
        s.first += once;
        s.second += once;
    }
}

/* Update entries under a fresh mask. The gradient is not written to. */
EXPORT CLONES void ct_adamw_masked(const ct_masked *task) {
    uint8_t keep[CT_BATCH];
    float gradients[CT_BATCH];
    const ct_masked t = *task;
    const ct_adamw h = *t.numbers;
    const ct_keys keys = ct_key_schedule(t.draw);
    for (int64_t done = 0, n; done < t.count; done += n) {
        const int64_t at = t.start + done, skip = (t.mask_start + at) % CT_BLOCK;
        n = t.count - done < CT_BATCH - skip ? t.count - done : CT_BATCH - skip;
        const float *g = t.gradient + at;
        const uint8_t *kept = keep + skip;
        ct_keep(t.draw, &keys, (uint64_t)(t.mask_start + at - skip), keep);
        for (int64_t i = 0; i < n; i++) {
            const float gradient = g[i];
            gradients[i] = kept[i] ? gradient : 0.0f;
        }
        update(t.weight + at, gradients, t.first + at, t.second + at, n, h);
    }
}

/* Update rows of which some have a gradient. */
EXPORT CLONES void ct_adamw_rows(const ct_rows *task) {
    const float none[CT_BATCH] = {0};
    const ct_rows t = *task;
    const ct_adamw h = *t.numbers;
    for (int64_t r = t.start; r < t.start + t.count; r++) {
        float *w = t.weight + r * t.width, *m = t.first + r * t.width, *v = t.second + r * t.width;
        if (t.place[r] >= 0) {
            update(w, t.gradient + t.place[r] * t.width, m, v, t.width, h);
            continue;
        }
        for (int64_t i = 0; i < t.width; i += CT_BATCH)
            update(w + i, none, m + i, v + i, t.width - i < CT_BATCH ? t.width - i : CT_BATCH, h);
    }
}
