// The kernels of csrc/, without torch, against their equations: random calls of all of them, in all
// types, with any strides, features and threads. `parity [CALLS [FIRST_SEED]]` makes CALLS calls,
// each from a seed of its own, and prints the seeds of those that fail; `parity 1 SEED` repeats
// one.

#include <unistd.h>

#include <cinttypes>
#include <csignal>
#include <exception>

#include "attention_parity.h"
#include "rows_parity.h"

namespace parity {
namespace {

// The equations in the type that the kernel computes in, and in a wider one.
template <typename Case, typename Equations>
std::string fault_beside(
    const Case& of, Item item, const Results& got, const Equations& equations) {
  if (item == kDouble) {
    return fault_of(
        got, equations(of, static_cast<long double>(0), std::optional<Item>()),
        equations(of, 0.0, std::optional<Item>(kDouble)));
  }
  return fault_of(
      got, equations(of, 0.0, std::optional<Item>()),
      equations(of, 0.0f, std::optional<Item>(item)));
}

struct Outcome {
  std::string call, fault;
};

Outcome outcome_of(uint64_t seed) {
  Random random(seed);
  Outcome outcome;
  Results got;
  const int64_t which = random.between(0, 9);
  if (which < 6) {
    const AttentionCase of = draw_attention(random);
    outcome.call = text_of(of);
    got = AttentionRun(of, random).answer(outcome.fault);
    if (outcome.fault.empty()) {
      outcome.fault = fault_beside(of, of.item, got, [](const auto& call, auto zero, auto stored) {
        return AttentionEquations<decltype(zero)>(call, stored).answer();
      });
    }
  } else if (which < 8) {
    const NormCase of = draw_norm(random);
    outcome.call = text_of(of);
    got = run_norm(of, random, outcome.fault);
    if (outcome.fault.empty()) {
      outcome.fault = fault_beside(of, of.item, got, [](const auto& call, auto zero, auto stored) {
        return norm_equations<decltype(zero)>(call, stored);
      });
    }
  } else {
    const SoftmaxCase of = draw_softmax(random);
    outcome.call = text_of(of);
    got = run_softmax(of, random, outcome.fault);
    if (outcome.fault.empty()) {
      outcome.fault =
          fault_beside(of, of.mask.item, got, [](const auto& call, auto zero, auto stored) {
            return softmax_equations<decltype(zero)>(call, stored);
          });
    }
  }
  return outcome;
}

int64_t number(const char* text) {
  char* end = nullptr;
  const int64_t value = std::strtoll(text, &end, 10);
  if (end == text || *end != '\0' || value < 0) {
    std::fprintf(stderr, "expected a number, got '%s'\nusage: parity [CALLS [FIRST_SEED]]\n", text);
    std::exit(2);
  }
  return value;
}

volatile int64_t current_seed = 0;

// A crash says its seed. (Sanitizers raise SIGABRT where abort_on_error=1.)
void report_crash(int signal) {
  char text[80];
  const int length =
      std::snprintf(text, sizeof text, "seed %" PRId64 ": signal %d\n", current_seed, signal);
  if (write(STDERR_FILENO, text, static_cast<size_t>(length)) == length) {
    _exit(1);
  }
  _exit(2);
}

int test(int64_t calls, int64_t first_seed) {
  for (const int signal : {SIGABRT, SIGSEGV, SIGBUS, SIGILL, SIGFPE}) {
    std::signal(signal, report_crash);
  }
  int64_t failed = 0;
  for (int64_t seed = first_seed; seed < first_seed + calls; ++seed) {
    current_seed = seed;
    const Outcome outcome = outcome_of(static_cast<uint64_t>(seed));
    if (!outcome.fault.empty()) {
      std::printf("seed %" PRId64 ": %s: %s\n", seed, outcome.call.c_str(), outcome.fault.c_str());
      ++failed;
    }
  }
  std::printf(
      "%" PRId64 " of %" PRId64 " calls agree with their equations: vectors of %d bits%s\n",
      calls - failed, calls, 8 * rowmax::chosen_kernels().vector_bytes,
      rowmax::pair_kernels() != nullptr ? ", bfloat16 dot products" : "");
  return failed == 0 ? 0 : 1;
}

}  // namespace
}  // namespace parity

int main(int count, char** arguments) {
  try {
    const int64_t calls = count > 1 ? parity::number(arguments[1]) : 1000;
    return parity::test(calls, count > 2 ? parity::number(arguments[2]) : 0);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}
