// The streams of a row as a GPU thread reads them.
#pragma once

#include "../row_args.h"
#include "vectors.h"

namespace pad {
namespace PAD_ISA {

constexpr int kRowThreads = 256;  // most threads of a row pass's block

// One number from each of the S streams, or one vector.
template <int S>
struct Fetched {
  Vector of[S];
};

// What a row pass needs of its block's streams, beside BlockArgs; made on the host.
struct Heads {
  Head<float> of[kMaxStreams];
};
inline Heads make_heads(const BlockArgs& args) {
  Heads heads = {};
  for (int j = 0; j < args.streams; ++j)
    heads.of[j] =
        make_head<float>(args.stream[j].scale, args.stream[j].softcap, args.stream[j].temperature);
  return heads;
}

template <class Z>
PAD_DEVICE const Z* logits_at(const StreamArgs& stream, int64_t row, int64_t col) {
  return static_cast<const Z*>(stream.logits) + row * stream.ld + col;
}

// Whether every stream of a row that is there can be read in vectors together with the first.
template <class Z, int S>
PAD_DEVICE bool streams_alike(const BlockArgs& args, int64_t row) {
  const Z* first = logits_at<Z>(args.stream[0], row, 0);
  bool alike = true;
  PAD_UNROLL
  for (int j = 1; j < S; ++j)
    if (args.stream[j].logits)
      alike = alike && aligned_alike(first, logits_at<Z>(args.stream[j], row, 0));
  return alike;
}

// Numbers as they are stored behind their head transform, step by step as on a CPU; with `chain`
// its derivative too.
template <int kCount>
PAD_DEVICE void transform_lanes(const StreamArgs& stream, const Head<float>& head, int64_t col,
                                float (&a)[kCount], float* chain) {
  if (stream.bias) {
    const float* bias = static_cast<const float*>(stream.bias) + col;
    PAD_UNROLL
    for (int i = 0; i < kCount; ++i) a[i] += bias[i];
  }
  if (head.identity) return;
  PAD_UNROLL
  for (int i = 0; i < kCount; ++i) a[i] *= head.scale;
  if (head.capped) {
    PAD_UNROLL
    for (int i = 0; i < kCount; ++i) {
      const TanhSlope<float> cap = tanh_of(a[i] / head.softcap);
      a[i] = head.softcap * cap.value;
      if (chain) chain[i] = head.slope * cap.slope;
    }
  }
  PAD_UNROLL
  for (int i = 0; i < kCount; ++i) a[i] /= head.temperature;
}

}  // namespace PAD_ISA
}  // namespace pad
