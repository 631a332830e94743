/* Masks on their own, for optimizers that have no one-pass step, and dropouts. */
#include "exported.h"
#include "philox.h"

/* Entries start ... start + count - 1 of a mask; start is a multiple of 32. */
typedef struct {
    uint8_t *out;
    int64_t start, count;
    const ct_draw *draw;
} ct_kept;

/* The same, and the numbers that they are of. */
typedef struct {
    float *out;
    const float *in;
    int64_t start, count;
    const ct_draw *draw;
    float scale;
} ct_dropped;

/* Write 1 or 0 for each entry. */
EXPORT CLONES void ct_keep_mask(const ct_kept *t) {
    const ct_keys keys = ct_key_schedule(t->draw);
    uint8_t keep[CT_BATCH];
    for (int64_t i = 0; i < t->count; i += CT_BATCH) {
        const int64_t n = t->count - i < CT_BATCH ? t->count - i : CT_BATCH;
        ct_keep(t->draw, &keys, (uint64_t)(t->start + i), keep);
        for (int64_t j = 0; j < n; j++) t->out[i + j] = keep[j] & 1;
    }
}

/* out = in * scale where an entry is kept, else in * 0; out may be in. */
EXPORT CLONES void ct_dropout(const ct_dropped *t) {
    const ct_keys keys = ct_key_schedule(t->draw);
    const float *in = t->in, scale = t->scale;
    float *out = t->out;
    uint8_t keep[CT_BATCH];
    for (int64_t i = 0; i < t->count; i += CT_BATCH) {
        const int64_t n = t->count - i < CT_BATCH ? t->count - i : CT_BATCH;
        ct_keep(t->draw, &keys, (uint64_t)(t->start + i), keep);
        for (int64_t j = 0; j < n; j++) out[i + j] = in[i + j] * (keep[j] ? scale : 0.0f); /* NaN stays NaN */
    }
}
