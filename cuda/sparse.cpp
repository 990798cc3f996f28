// Block-sparse products on the CPU, shared out among torch's threads by output blocks.
//
// Sums of float32 in float32, and of float64 in float64, go by sparse_cpu_panels.h. Any other accumulator takes the
// kernels of dense products, one output block at a time, on operands that are gathered for it.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "lowprec/accumulate_cpu.h"
#include "lowprec/default_arithmetic.h"
#include "lowprec/draws.h"
#include "lowprec/sparse_cpu.h"
#include "lowprec/sparse_cpu_ops.h"

namespace lowprec {
namespace {

using torch::stable::narrow;
using torch::stable::transpose;
using torch::stable::unsqueeze;

template <class T>
T* elements(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

template <class C>
Lines<C> lines(const Tensor& x, bool first) {
  const auto* data = static_cast<const typename C::Bits*>(x.const_data_ptr());
  return first ? Lines<C>{data, x.stride(1), x.stride(0)} : Lines<C>{data, x.stride(0), x.stride(1)};
}

// Fused multiply-adds without vectors.

template <class C>
NumberOf<C> number(typename C::Bits bits) {
  using Carrier = CarrierOf<C>;
  return bit_cast<NumberOf<C>>(widen<C, Carrier>(bits));
}

template <class C>
void multiply_sparse(const SparseProduct<C>& x, int64_t token, int64_t j) {
  using Number = NumberOf<C>;
  const int64_t b = x.w.block;
  const int32_t first = x.columns.offsets[j], last = x.columns.offsets[j + 1];
  Number sums[kMaxBlock];
  std::fill_n(sums, b, first == last ? Number(0) : -Number(0));
  for (int64_t n = first; n < last; ++n) {
    const int64_t input = x.columns.pairs[2 * n], id = x.columns.pairs[2 * n + 1];
    const auto* from = x.x.data + token * x.x.stride + input * b * x.x.step;
    for (int64_t k = 0; k < b; ++k) {
      const bool closed = x.w.closed(id);
      const Number factor = closed ? Number(0) : number<C>(from[k * x.x.step]);
      const Number* w = x.w.at(id) + k * x.w.term_step;
      for (int64_t i = 0; i < b; ++i) sums[i] = std::fma(factor, w[i * x.w.output_step], sums[i]);
    }
  }
  for (int64_t i = 0; i < b; ++i) x.out[token * x.token_step + (j * b + i) * x.feature_step] = sums[i];
}

template <class C>
void multiply_sparse(const SparseProduct<C>& x) {
  parallel_for(0, x.tokens * x.columns.outputs, 1, [&](int64_t begin, int64_t end) {
    const DefaultArithmetic arithmetic;
    for (int64_t i = begin; i < end; ++i) multiply_sparse(x, i / x.columns.outputs, i % x.columns.outputs);
  });
}

template <class C>
void update_sparse(const SparseUpdate<C>& x) {
  using Number = NumberOf<C>;
  const int64_t b = x.block;
  parallel_for(0, x.blocks * b, 1, [&](int64_t begin, int64_t end) {
    const DefaultArithmetic arithmetic;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t id = row / b, input = x.at[2 * id] * b + row % b, output = x.at[2 * id + 1] * b;
      Number* sums = x.out + row * b;
      std::fill_n(sums, b, -Number(0));
      for (int64_t n = 0; n < x.count; ++n) {
        const auto& [left, right, tokens] = x.pairs[n];
        for (int64_t token = 0; token < tokens; ++token) {
          const Number factor = number<C>(left.data[token * left.stride + input * left.step]);
          const auto* dy = right.data + token * right.stride + output * right.step;
          for (int64_t i = 0; i < b; ++i) sums[i] = std::fma(factor, number<C>(dy[i * right.step]), sums[i]);
        }
      }
    }
  });
}

template <class C>
void run(const SparseProduct<C>& x) {
#ifdef LOWPREC_VECTORS
  if (vectors() == Vectors::avx512) return multiply_sparse_avx512(x);
  if (vectors() == Vectors::avx2) return multiply_sparse_avx2(x);
#endif
  multiply_sparse(x);
}

template <class C>
void run(const SparseUpdate<C>& x) {
#ifdef LOWPREC_VECTORS
  if (vectors() == Vectors::avx512) return update_sparse_avx512(x);
  if (vectors() == Vectors::avx2) return update_sparse_avx2(x);
#endif
  update_sparse(x);
}

// Any accumulator, on gathered operands.

/// The operands of an output block, its terms side by side. Elements are bytes here.
class Gather {
 public:
  explicit Gather(const SparseCall& call)
      : call_(call),
        columns_(call.columns()),
        size_(static_cast<int64_t>(call.x.element_size())),
        x_(static_cast<const char*>(call.x.const_data_ptr())),
        w_(static_cast<const char*>(call.w.const_data_ptr())) {}

  int64_t terms(int64_t j) const { return (columns_.offsets[j + 1] - columns_.offsets[j]) * call_.block(); }

  /// Tokens [begin, begin + count) as [terms][count].
  void left(int64_t j, int64_t begin, int64_t count, char* to) const {
    const int64_t b = call_.block();
    each(j, [&](int64_t input, int64_t id) {
      const bool closed = call_.closed(id);
      for (int64_t k = input * b; k < (input + 1) * b; ++k, to += count * size_) {
        if (closed) {
          std::memset(to, 0, static_cast<size_t>(count * size_));
        } else {
          copy(to, x_, k * call_.tokens() + begin, count);
        }
      }
    });
  }

  /// Weights: [terms][block], or [block][terms] of transposed ones.
  void right(int64_t j, char* to) const {
    const int64_t b = call_.block(), pitch = call_.transpose ? terms(j) : b;
    each(j, [&](int64_t, int64_t id) {
      for (int64_t i = 0; i < b; ++i) copy(to + i * pitch * size_, w_, (id * b + i) * b, b);
      to += (call_.transpose ? b : b * b) * size_;
    });
  }

 private:
  template <class F>
  void each(int64_t j, const F& f) const {
    for (int64_t n = columns_.offsets[j]; n < columns_.offsets[j + 1]; ++n) {
      f(columns_.pairs[2 * n], columns_.pairs[2 * n + 1]);
    }
  }

  void copy(char* to, const char* from, int64_t place, int64_t count) const {
    std::memcpy(to, from + place * size_, static_cast<size_t>(count * size_));
  }

  const SparseCall& call_;
  SparseColumns columns_;
  int64_t size_;
  const char* x_;
  const char* w_;
};

struct Cpu {
  /// Sums of x's own carrier, one term after the other.
  template <class C>
  static void multiply(const SparseCall& call, const Tensor& out) {
    const Tensor w = convert(call.w, out.scalar_type());
    const int64_t b = call.block();
    const SparseWeights<NumberOf<C>> weights{elements<const NumberOf<C>>(w), b, call.transpose ? 1 : b,
                                             call.transpose ? b : 1, call.gate_data()};
    run(SparseProduct<C>{lines<C>(call.x, call.first), call.tokens(), call.features(), call.columns(), weights,
                         elements<NumberOf<C>>(out), call.token_step(), call.feature_step()});
  }

  template <class C>
  static void update(const UpdateCall& call, const Tensor& out) {
    std::vector<SparsePair<C>> pairs;
    for (size_t n = 0; n < call.x.size(); ++n) {
      pairs.push_back({lines<C>(call.x[n], call.first), lines<C>(call.dy[n], call.first), call.tokens_of(n)});
    }
    const int32_t* at = call.at();
    run(SparseUpdate<C>{pairs.data(), static_cast<int64_t>(pairs.size()), call.tokens(), call.inputs(), call.outputs(),
                        call.block, call.blocks, at, at + 2 * call.blocks, elements<NumberOf<C>>(out)});
  }

  /// Every accumulator whose leaves are terms.
  template <class C>
  static void multiply_under(const AccumulatorSpec& spec, const SumSeed& words, const SparseCall& call,
                             const Tensor& out) {
    constexpr int64_t together = 256;  // tokens
    const Gather gather(call);
    const SparseColumns columns = call.columns();
    const int64_t b = call.block(), regions = (call.tokens() - 1) / together + 1, work = columns.work();
    auto* results = elements<typename CarrierOf<C>::Bits>(out);
    const int64_t roundings = roundings_of(spec, columns.longest() * b);
    parallel_for(0, regions * work, 1, [&](int64_t begin, int64_t end) {
      std::vector<typename C::Bits> left, right;
      for (int64_t region = begin / work; region * work < end; ++region) {
        const int64_t token = region * together, count = std::min(together, call.tokens() - token);
        const int64_t last = columns.at(std::min(end - region * work, work));
        for (int64_t j = columns.at(std::max<int64_t>(begin - region * work, 0)); j < last; ++j) {
          const int64_t terms = gather.terms(j);
          left.resize(terms * count);
          right.resize(terms * b);
          gather.left(j, token, count, reinterpret_cast<char*>(left.data()));
          gather.right(j, reinterpret_cast<char*>(right.data()));
          Product<C> x{{left.data(), 1, count},
                       call.transpose ? Lines<C>{right.data(), terms, 1} : Lines<C>{right.data(), 1, b},
                       0,
                       0,
                       1,
                       count,
                       b,
                       terms,
                       token * call.token_step() + j * b * call.feature_step(),
                       call.token_step(),
                       call.feature_step()};
          x.roundings = roundings;
          multiply_any(spec, words.seed, words.offset, x, results);
        }
      }
    });
  }

  /// The same for updates.
  template <class C>
  static void update_under(const AccumulatorSpec& spec, const SumSeed& words, const UpdateCall& call,
                           const Tensor& out) {
    const int64_t b = call.block, tokens = call.tokens();
    const auto* at = call.at();
    const auto* x = elements<const typename C::Bits>(call.x[0]);
    const auto* dy = elements<const typename C::Bits>(call.dy[0]);
    const std::vector<int64_t> starts = runs(call);
    parallel_for(0, static_cast<int64_t>(starts.size()) - 1, 1, [&](int64_t begin, int64_t end) {
      std::vector<typename C::Bits> right;
      for (int64_t n = begin; n < end; ++n) {
        const int64_t id = starts[n], count = starts[n + 1] - id;
        right.resize(count * b * tokens);
        for (int64_t k = 0; k < count; ++k) {
          std::copy_n(dy + at[2 * (id + k) + 1] * b * tokens, b * tokens, right.data() + k * b * tokens);
        }
        Product<C> product{{x + at[2 * id] * b * tokens, tokens, 1},
                           {right.data(), tokens, 1},
                           0,
                           0,
                           1,
                           b,
                           count * b,
                           tokens,
                           id * b * b,
                           b,
                           1};
        product.piece = b;
        product.piece_step = b * b;
        multiply_any(spec, words.seed, words.offset, product, elements<typename CarrierOf<C>::Bits>(out));
      }
    });
  }

  /// The model of Hopper's tensor cores below a sum of its leaves.
  static void multiply_hopper(const AccumulatorSpec& spec, const SumSeed& words, const SparseCall& call,
                              const Tensor& out) {
    const Gather gather(call);
    const SparseColumns columns = call.columns();
    const int64_t b = call.block(), tokens = call.tokens();
    const int64_t roundings = roundings_of(spec, columns.longest() * b);
    for (int64_t j = 0; j < columns.outputs; ++j) {
      const int64_t terms = gather.terms(j);
      const Tensor left = empty(call.x, {1, terms, tokens}, call.x.scalar_type());
      Tensor right = call.transpose ? empty(call.w, {1, b, terms}, call.w.scalar_type())
                                    : empty(call.w, {1, terms, b}, call.w.scalar_type());
      gather.left(j, 0, tokens, elements<char>(left));
      gather.right(j, elements<char>(right));
      if (call.transpose) right = transpose(right, 1, 2);
      add_leaves(spec, words, transpose(left, 1, 2), right, roundings,
                 {j * b * call.feature_step(), call.feature_step(), b, call.token_step()}, out);
    }
  }

  static void update_hopper(const AccumulatorSpec& spec, const SumSeed& words, const UpdateCall& call,
                            const Tensor& out) {
    const int64_t b = call.block;
    for (int64_t id = 0; id < call.blocks; ++id) {
      Tensor x = call.x[0], dy = call.dy[0];
      x = narrow(x, 0, call.at()[2 * id] * b, b);
      dy = narrow(dy, 0, call.at()[2 * id + 1] * b, b);
      add_leaves(spec, words, unsqueeze(x, 0), unsqueeze(transpose(dy, 0, 1), 0), 0, {id * b * b, 1, 0, 0}, out);
    }
  }

 private:
  /// Where outputs lie: the first, the next, and from one piece of so many to the next.
  struct Outputs {
    int64_t origin, step, piece, piece_step;
  };

  static void add_leaves(AccumulatorSpec spec, const SumSeed& words, const Tensor& left, const Tensor& right,
                         int64_t roundings, const Outputs& outputs, const Tensor& out) {
    constexpr uint32_t one = 0x3F800000;
    const Tensor leaves = call("lowprec::hopper_leaves", "", left, right, static_cast<int64_t>(spec.leaf), spec.terms);
    const int64_t count = leaves.size(3);
    spec.leaf = Leaf::terms;
    Product<Float32> sums{{&one, 0, 0},
                          {elements<const uint32_t>(leaves), count, 1},
                          0,
                          0,
                          1,
                          1,
                          left.size(1) * right.size(2),
                          count,
                          outputs.origin,
                          0,
                          outputs.step};
    sums.roundings = roundings;
    sums.piece = outputs.piece;
    sums.piece_step = outputs.piece_step;
    multiply_any(spec, words.seed, words.offset, sums, elements<uint32_t>(out));
  }

  /// Where runs of weights begin that share an input block, none wider than the kernels' blocks; and the end.
  static std::vector<int64_t> runs(const UpdateCall& call) {
    constexpr int64_t widest = 128;
    std::vector<int64_t> starts;
    for (int64_t id = 0; id < call.blocks; ++id) {
      const bool joins = !starts.empty() && call.at()[2 * id] == call.at()[2 * starts.back()] &&
                         (id + 1 - starts.back()) * call.block <= widest;
      if (!joins) starts.push_back(id);
    }
    starts.push_back(call.blocks);
    return starts;
  }
};

STABLE_TORCH_LIBRARY_IMPL(lowprec, CPU, library) { register_sparse<Cpu>(library); }

}  // namespace
}  // namespace lowprec
