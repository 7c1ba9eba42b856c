// Philox4x32-10 on vectors (Salmon et al. 2011), the random words of dropout.

#pragma once

#include "constants.h"
#include "simd/vector.h"

namespace rowmax {
namespace ROWMAX_ISA {

typedef Vec<uint64_t> Wide;  // 32-bit words in 64-bit lanes

// The product of the low halves of each lane.
ROWMAX_INLINE Wide multiply_low(Wide a, Wide b) {
#if defined(ROWMAX_AVX512)
  return reinterpret_cast<Wide>(
      _mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(ROWMAX_AVX2)
  return reinterpret_cast<Wide>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__x86_64__)
  return reinterpret_cast<Wide>(
      _mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  return (a & 0xffffffff) * (b & 0xffffffff);
#endif
}

struct Counters {
  Wide word[4];
};

// Philox4x32-10 of four counter words in 64-bit lanes. Of the results the low halves count: the
// product reads the low halves and ignores the high ones, so a round is a product, a shift and an
// exclusive or, twice, with no conversion.
ROWMAX_INLINE Counters philox_rounds(Counters c, uint64_t seed) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < PHILOX_ROUNDS; ++round) {
    const Wide product0 = multiply_low(c.word[0], Wide{} + PHILOX_MULTIPLIERS[0]);
    const Wide product1 = multiply_low(c.word[2], Wide{} + PHILOX_MULTIPLIERS[1]);
    c = {
        {(product1 >> 32) ^ c.word[1] ^ k0, product1, (product0 >> 32) ^ c.word[3] ^ k1, product0}};
    k0 += static_cast<uint32_t>(PHILOX_WEYL[0]);
    k1 += static_cast<uint32_t>(PHILOX_WEYL[1]);
  }
  return c;
}

template <typename T>
struct RandomWords {
  Words<T> word[4];  // each below 2^32
};

// Philox of the counters (group, first_query + lane, head, batch).
template <typename T>
ROWMAX_INLINE RandomWords<T> philox(
    uint32_t group, uint32_t first_query, uint32_t head, uint32_t batch, uint64_t seed) {
  const Words<T> query = lane_numbers<WordOf<T>>() + static_cast<WordOf<T>>(first_query);
  const Wide lanes = reinterpret_cast<Wide>(query);
  RandomWords<T> result;
  const Counters even =
      philox_rounds({{Wide{} + group, lanes & 0xffffffff, Wide{} + head, Wide{} + batch}}, seed);
  if constexpr (sizeof(T) == 8) {
    for (int n = 0; n < 4; ++n) {
      result.word[n] = even.word[n] & 0xffffffff;
    }
  } else {
    const Counters odd =
        philox_rounds({{Wide{} + group, lanes >> 32, Wide{} + head, Wide{} + batch}}, seed);
    for (int n = 0; n < 4; ++n) {
      result.word[n] =
          reinterpret_cast<Words<T>>((even.word[n] & 0xffffffff) | (odd.word[n] << 32));
    }
  }
  return result;
}

// Words of the counters (group + n, word1, word2, word3) in memory's order: lane l of vector v is word
// i % 4 of counter group + i / 4 with i = v * lanes + l.
template <typename T>
ROWMAX_INLINE RandomWords<T> philox_columns(
    uint32_t group, uint32_t word1, uint32_t word2, uint32_t word3, uint64_t seed) {
  constexpr int counters = LANES<uint64_t>;
  RandomWords<T> result;
  for (int part = 0; part < (sizeof(T) == 8 ? 1 : 2); ++part) {
    const uint64_t first = group + static_cast<uint64_t>(part) * counters;
    const Counters c = philox_rounds(
        {{(lane_numbers<uint64_t>() + first) & 0xffffffff, Wide{} + word1, Wide{} + word2,
          Wide{} + word3}},
        seed);
    const Wide low = (c.word[0] & 0xffffffff) | c.word[1] << 32;
    const Wide high = (c.word[2] & 0xffffffff) | c.word[3] << 32;
    for (int half = 0; half < 2; ++half) {
      const Wide words = interleave(low, high, half);
      if constexpr (sizeof(T) == 8) {
        typedef Lanes<uint32_t, VECTOR_BYTES / 2> Narrow;
        Narrow parts[2];
        __builtin_memcpy(parts, &words, sizeof words);
        result.word[2 * half] = __builtin_convertvector(parts[0], Wide);
        result.word[2 * half + 1] = __builtin_convertvector(parts[1], Wide);
      } else {
        result.word[2 * part + half] = reinterpret_cast<Words<T>>(words);
      }
    }
  }
  return result;
}

// Which lanes dropout keeps.
template <typename T>
ROWMAX_INLINE Ints<T> at_least(Words<T> words, int64_t threshold) {
  return words >= static_cast<WordOf<T>>(threshold);
}

}  // namespace ROWMAX_ISA
}  // namespace rowmax
