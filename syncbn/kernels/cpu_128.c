/* The loops by 128 bits: what every processor has. */

#include "cpu.h"
#define SET 128
#include "cpu_half.h"
#include "cpu_loops.h"
