/* The monotonic clock in seconds, as time.monotonic() returns it; read twice per task. And a counter of the processor,
   read in a quarter of the time, which says whether a time that was read before is still good. */

#ifndef BGTASKS_CLOCK_H
#define BGTASKS_CLOCK_H

#include <Python.h>
#if defined(_MSC_VER)
#include <intrin.h>
#endif

static inline double
bgtasks_monotonic(void)
{
#if PY_VERSION_HEX >= 0x030d0000
    PyTime_t nanoseconds;
    (void)PyTime_MonotonicRaw(&nanoseconds);
#else
    _PyTime_t nanoseconds = _PyTime_GetMonotonicClock();
#endif
    /* Python's own conversion divides twice to keep the last bit, which takes as long as reading the clock. */
    return (double)nanoseconds * 1e-9;
}

/* Return whether the counter is at most 8 microseconds beyond *ticks, less on a fast processor; if not, set *ticks to it.
   Where no counter is known, it never is. */
static inline int
bgtasks_is_recent(uint64_t *ticks)
{
    uint64_t now, few;
#if defined(_MSC_VER) && (defined(_M_X64) || defined(_M_IX86))
    now = __rdtsc();
    few = 8192;
#elif defined(__x86_64__) || defined(__i386__)
    now = __builtin_ia32_rdtsc();
    few = 8192;
#elif defined(__aarch64__) && defined(__GNUC__)
    __asm__ volatile("mrs %0, cntvct_el0" : "=r"(now));
    __asm__ volatile("mrs %0, cntfrq_el0" : "=r"(few));
    few >>= 17;
#else
    now = few = 0;
#endif
    /* Unsigned: on another processor, whose counter may be behind, it is far beyond. */
    if (now - *ticks < few) {
        return 1;
    }
    *ticks = now;
    return 0;
}

#endif
