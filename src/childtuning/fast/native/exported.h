/* Functions that Python calls, and those of them that are compiled once for each kind of processor. */
#ifndef CT_EXPORTED_H
#define CT_EXPORTED_H

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("default", "arch=haswell", "arch=skylake-avx512")))
#else
#define CLONES
#endif

#include <stdint.h>

#endif
