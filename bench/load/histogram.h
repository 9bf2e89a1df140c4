/* A histogram of latencies with buckets of equal relative width, after HdrHistogram.
 *
 * Values are nanoseconds. Below 2^(SUB_BITS + 1) a bucket holds one value; above, each power of two is divided
 * into 2^SUB_BITS buckets, so that a percentile is too high by less than one part in 2^SUB_BITS (1.6 %). Recording is a
 * shift and an increment: it happens once for each delivery, millions of times a second.
 */
#ifndef HISTOGRAM_H
#define HISTOGRAM_H

#include <stdint.h>

#define SUB_BITS 6
#define BUCKETS ((64 - SUB_BITS + 1) << SUB_BITS)

struct histogram {
    uint64_t count;
    uint64_t max;
    uint64_t buckets[BUCKETS];
};

static inline void histogram_add(struct histogram *histogram, uint64_t value) {
    int shift = 63 - __builtin_clzll(value | 1) - SUB_BITS;
    uint64_t index = shift <= 0 ? value : ((uint64_t)shift << SUB_BITS) + (value >> shift);
    histogram->buckets[index]++;
    histogram->count++;
    if (value > histogram->max)
        histogram->max = value;
}

/* The smallest value that at least so many thousandths of the recorded values do not exceed; 0 if there are none. */
static inline uint64_t histogram_percentile(const struct histogram *histogram, unsigned thousandths) {
    uint64_t wanted = (histogram->count * thousandths + 999) / 1000, seen = 0;
    for (uint64_t index = 0; index < BUCKETS; index++) {
        seen += histogram->buckets[index];
        if (seen == 0 || seen < wanted)
            continue;
        int shift = (int)(index >> SUB_BITS) - 1;
        if (shift <= 0)
            return index;
        uint64_t top = ((index - ((uint64_t)shift << SUB_BITS) + 1) << shift) - 1;
        return top < histogram->max ? top : histogram->max;
    }
    return histogram->max;
}

#endif
