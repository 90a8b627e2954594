// The row passes over float32 logits.
#include "row_launch.h"

namespace pad {
PAD_DEFINE_STORED(float32, float)
}  // namespace pad
