#define FDFAST_ROWS generic
#include "rows_kernel.hpp"
