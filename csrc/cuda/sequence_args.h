// The arguments of the kernels over sequences: rewards of token log-probs, listwise losses. Plain
// data; numbers of any floating dtype are read as double.
#pragma once

#include <stdint.h>

#include "../listwise.h"
#include "../row_args.h"

namespace pad {

// Numbers of a dtype that only the call knows.
struct NumbersArgs {
  const void* at;
  DType dtype;
};

// Token log-probs of sequences, and which of them count.
struct TokensArgs {
  NumbersArgs logprob;     // (total,), or null
  const int64_t* offsets;  // (sequences + 1,), or null: `length` tokens in each
  int64_t length, total;
  const uint8_t* mask;  // (total,), or null
  const void* labels;   // (total,) of label_bytes, or null: all but ignore_index count
  int label_bytes;
  int64_t ignore_index;
  bool mean;  // over the tokens that count; else the sum
};

struct RewardsArgs {
  TokensArgs tokens;
  int64_t sequences;
  DType result;
  void* reward;           // (sequences,)
  double* inverse_count;  // (sequences,): the derivative by each token that counts
  void* queue;
};

// The gradient of tokens: upstream[s / per] * gradient[s] * inverse_count[s] for those of sequence
// s that count, 0 for the others.
struct RewardsGradientArgs {
  TokensArgs tokens;  // its log-probs are not read
  int64_t sequences;
  NumbersArgs upstream;
  int64_t upstream_step;  // between its elements; 0 where all are one
  int64_t per;
  NumbersArgs gradient;  // (sequences,), or null for ones
  const double* inverse_count;
  DType result;
  void* out;  // (total,)
  void* queue;
};

struct ListwiseArgs {
  portable::Listwise kind;
  int64_t groups;
  int n, subset;        // responses of a group, and how many of them are ranked at once
  double beta;          // scales all rewards
  NumbersArgs student;  // (groups, n), or null: rewards of `tokens`, a sequence for each response
  TokensArgs tokens;
  NumbersArgs teacher;   // (groups, n)
  const uint8_t* valid;  // (groups, n), or null
  DType result;
  void* loss;             // (groups,)
  void* gradient;         // (groups, n) by the rewards, or null
  double* inverse_count;  // (groups * n,), see RewardsArgs; with tokens
  size_t shared_limit;    // that a block may have, in bytes
  void* workspace;        // see listwise_plan
  void* queue;
};

namespace cuda {

void rewards(const RewardsArgs&);
void rewards_gradient(const RewardsGradientArgs&);
void listwise(const ListwiseArgs&);

// Where a subset recursion keeps a number for each of its 2^n sets.
enum class Storage { shared64, shared32, global64 };

struct ListwisePlan {
  Storage storage;
  int threads;
  size_t shared;     // bytes of a block
  size_t workspace;  // bytes of global memory for all groups
};

// `wide`: the result is float64. `limit`: shared memory that a block may have, in bytes.
ListwisePlan listwise_plan(portable::Listwise kind, int n, int64_t groups, bool wide, size_t limit);

}  // namespace cuda
}  // namespace pad
