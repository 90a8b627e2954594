// What a walk over a row remembers from one sweep to the next. For row_pass.cpp alone, once per
// instruction set.
#pragma once

#include "tile_loops.h"

namespace pad {
namespace PAD_ISA {
namespace {

// The exponentials of a row's first two streams, student and teacher, where the memory is given for
// them. The slopes of a divergence take the place of the teacher's. Each tile's are relative to a
// maximum of its own.
template <class T>
class Kept {
 public:
  static int64_t bytes(int64_t cols) { return 2 * (cols + tiles(cols)) * int64_t(sizeof(T)); }

  Kept(void* room, int64_t cols) {
    T* next = static_cast<T*>(room);
    for (int j = 0; j < 2; ++j, next += cols) exps_[j] = next;
    for (int j = 0; j < 2; ++j, next += tiles(cols)) maximum_[j] = next;
  }

  // Where the exponentials of columns [col, col + n) go. `col` is a multiple of kTile.
  T* start(int stream, int64_t col, int64_t n, T maximum) {
    for (int64_t i = col; i < col + n; i += kTile) maximum_[stream][i / kTile] = maximum;
    return exps_[stream] + col;
  }
  // The exponentials of a tile from `col` on, and what makes them relative to the row's maximum.
  T* exps(int stream, int64_t col) const { return exps_[stream] + col; }
  T scale(int stream, int64_t col, T maximum) const {
    return merge_scale(maximum_[stream][col / kTile], maximum);
  }

 private:
  static int64_t tiles(int64_t cols) { return (cols + kTile - 1) / kTile; }

  T* exps_[2];
  T* maximum_[2];
};

}  // namespace
}  // namespace PAD_ISA
}  // namespace pad
