// The row passes over float16 logits.
#include "row_launch.h"

namespace pad {
PAD_DEFINE_STORED(float16, PAD_ISA::float16)
}  // namespace pad
