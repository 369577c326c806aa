/* The monotonic clock in seconds, as time.monotonic() returns it; read twice per task. */

#ifndef BGTASKS_CLOCK_H
#define BGTASKS_CLOCK_H

#include <Python.h>

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

#endif
