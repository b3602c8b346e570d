// The row loops for any machine.
#define FDFAST_ROWS generic
#include "rows_kernel.hpp"
#include "fused_layers_kernel.hpp"
