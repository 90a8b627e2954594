// The row passes over bfloat16 logits.
#include "row_launch.h"

namespace pad {
PAD_DEFINE_STORED(bfloat16, PAD_ISA::bfloat16)
}  // namespace pad
