/* Exchange of some entries of a tensor for others: a child's values for its base model's. */
#include "exported.h"

#include <string.h>

#define AHEAD 64   /* positions looked ahead of the exchange */
#define PIECE 2048 /* bytes of a unit exchanged at a time */

/* count units of width bytes, unit i at index[i] * width bytes, and the same again a period further, repeats times in
   all; what is written and what was there lie in that order, repeats stride bytes apart. */
typedef struct {
    char *there;
    const char *written;
    char *before;
    const int32_t *index;
    int64_t count, width;
    int64_t repeats, period, stride;
} ct_entries;

#define EXCHANGE(type)                                                              \
    do {                                                                            \
        type *at = (type *)there;                                                   \
        const type *new = (const type *)written;                                    \
        type *old = (type *)before;                                                 \
        for (int64_t i = 0; i < e->count; i++) {                                    \
            if (i + AHEAD < e->count) __builtin_prefetch(at + e->index[i + AHEAD], 1); \
            const type kept = new[i]; /* old may be new */                          \
            old[i] = at[e->index[i]];                                               \
            at[e->index[i]] = kept;                                                 \
        }                                                                           \
    } while (0)

INLINE void exchange(const ct_entries *e, char *there, const char *written, char *before) {
    const int64_t width = e->width;
    switch (width) {
    case 1: EXCHANGE(uint8_t); return;
    case 2: EXCHANGE(uint16_t); return;
    case 4: EXCHANGE(uint32_t); return;
    case 8: EXCHANGE(uint64_t); return;
    }
    char kept[PIECE];
    for (int64_t i = 0; i < e->count; i++) {
        for (int64_t j = 0; j < width; j += PIECE) {
            const int64_t size = width - j < PIECE ? width - j : PIECE, own = i * width + j;
            char *at = there + e->index[i] * width + j;
            memcpy(kept, written + own, size);
            memcpy(before + own, at, size);
            memcpy(at, kept, size);
        }
    }
}

EXPORT void ct_exchange(const ct_entries *e) {
    for (int64_t r = 0; r < e->repeats; r++)
        exchange(e, e->there + r * e->period, e->written + r * e->stride, e->before + r * e->stride);
}
