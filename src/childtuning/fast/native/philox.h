/* Philox4x64-10 [Salmon et al. 2011]: the bits that kernels/philox.py describes, one block of 32 bytes a counter. */
#ifndef CT_PHILOX_H
#define CT_PHILOX_H

#include "exported.h"

#include <stdint.h>
#include <string.h>

#define CT_BLOCK 32  /* bytes a block, one for each entry */
#define CT_BATCH 256 /* entries masked at a time, held in the first-level cache */
#define CT_ROUNDS 10

typedef struct {
    uint64_t key[2];
    uint32_t top;  /* the first 8 bits of the threshold p * 2^64 */
    uint64_t rest; /* its other 56 bits */
} ct_draw;

typedef struct {
    uint64_t round[CT_ROUNDS][2];
} ct_keys;

INLINE ct_keys ct_key_schedule(const ct_draw *draw) {
    ct_keys keys;
    for (int r = 0; r < CT_ROUNDS; r++) {
        keys.round[r][0] = draw->key[0] + (uint64_t)r * 0x9E3779B97F4A7C15ull;
        keys.round[r][1] = draw->key[1] + (uint64_t)r * 0xBB67AE8584CAA73Bull;
    }
    return keys;
}

/* The 256 bits at counter (c0, c1, 0, 0). */
INLINE void ct_philox(const ct_keys *keys, uint64_t c0, uint64_t c1, uint64_t out[4]) {
    uint64_t c2 = 0, c3 = 0;
#pragma GCC unroll 10
    for (int r = 0; r < CT_ROUNDS; r++) {
        const unsigned __int128 product0 = (unsigned __int128)c0 * 0xD2E7470EE14C6C93ull;
        const unsigned __int128 product1 = (unsigned __int128)c2 * 0xCA5A826395121157ull;
        c0 = (uint64_t)(product1 >> 64) ^ c1 ^ keys->round[r][0];
        c1 = (uint64_t)product1;
        c2 = (uint64_t)(product0 >> 64) ^ c3 ^ keys->round[r][1];
        c3 = (uint64_t)product0;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

/* Whether an entry whose first 8 bits are those of the threshold is kept, by the 56 bits at counter (entry, 1). */
static __attribute__((noinline)) int ct_keep_tie(const ct_draw *draw, const ct_keys *keys, uint64_t entry) {
    uint64_t words[4];
    ct_philox(keys, entry, 1, words);
    return (words[0] >> 8) < draw->rest;
}

/* Whether each of CT_BATCH entries from start on, a multiple of CT_BLOCK, is kept: all ones or 0 each. numpy's
   generator, which drew these bits first, runs one block ahead of its counter. */
INLINE void ct_keep(const ct_draw *draw, const ct_keys *keys, uint64_t start, uint8_t keep[CT_BATCH]) {
    uint64_t words[CT_BATCH / 8], ties[CT_BATCH / 8];
    for (int b = 0; b < CT_BATCH / CT_BLOCK; b++) ct_philox(keys, start / CT_BLOCK + b + 1, 0, words + 4 * b);
    const uint8_t *bytes = (const uint8_t *)words, top = (uint8_t)draw->top;
    uint8_t *tied = (uint8_t *)ties;
    for (int i = 0; i < CT_BATCH; i++) {
        keep[i] = bytes[i] < top ? 0xFF : 0;
        tied[i] = bytes[i] == top ? 1 : 0;
    }
    for (int word = 0; word < CT_BATCH / 8; word++) {
        while (__builtin_expect(ties[word] != 0, 0)) {
            const int i = 8 * word + __builtin_ctzll(ties[word]) / 8;
            keep[i] = ct_keep_tie(draw, keys, start + i) ? 0xFF : 0;
            ties[word] &= ties[word] - 1;
        }
    }
}

#endif
