// The engine's arrays as raw pointers, and the work on them that every iteration does for all rows of a forward. The
// specification is roro_fast/engine/batching.py; both give the same bits.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "host/page_pool.h"

namespace roro {

// Fields as in engine/slots.py ([slots] unless said otherwise) and engine/kv.py.
struct EngineState {
  std::int64_t num_slots, max_len, num_models, num_parts, table_width, page_size;
  std::int64_t trunk;  // -1: the models share no layers
  std::int64_t* tokens;  // [slots][max_len]
  std::int64_t *length, *max_total, *max_step_tokens, *writer, *arrival, *rewrites, *top_k, *step_start, *matched;
  std::int64_t *written, *forward_tokens;  // [models][slots], [models + 1][slots]
  std::int8_t* phase;
  bool *paused, *ignore_eos, *drafting;
  float *temperature, *top_p;
  std::uint64_t* key;
  std::int64_t *last_tokens, *last_model, *step_index, *draws;
  double *last_mean_logprob, *last_min_logprob, *last_first_entropy, *last_mean_entropy, *run_min_conf, *run_prod_conf;
  float* budget;
  std::uint64_t* route_key;
  double *sum_logprob, *min_logprob, *first_entropy, *sum_entropy, *flops;
  const double *flops_per_token, *flops_per_pair, *window_flops_per_pair;  // [models + 1]
  const std::int64_t* windows;                                             // [models + 1]
  std::int64_t *table, *num_pages, *kv_len;  // [parts][slots][table_width], [parts][slots] twice
  bool* shared;                              // [parts][slots]
  const std::int64_t* home;                  // [models + 1]: the part whose pages a forward goes by
};

// Where a forward's batch is laid out; see `Stage` in engine/batching.py.
struct EngineStage {
  std::int64_t max_tokens;
  std::int64_t *ids, *positions, *slots, *state_slots;           // [max_tokens]
  std::int64_t *rows, *kv_lens, *cu_seqlens, *wanted, *top_k;    // [slots + 1]
  float *draws, *temperature, *top_p;                            // [slots]
  std::int64_t* table;                                           // [slots][table_width]
};

struct BatchSizes {
  std::int64_t rows, tokens, wanted, pages;
  bool truncated, alike;
};

struct StepEnd {
  std::int64_t slot;
  bool closed, ended, full;
};

// What ends a step and an answer, per model.
struct Vocabulary {
  const std::int64_t* delimiter;  // [states][size]; `states` itself means that the step ends
  std::int64_t states, size;
  const std::int64_t* eos;
  std::int64_t num_eos;
};

// Where a part's pages come from, and its number there.
struct PartPool {
  PagePool* pool;
  std::int64_t number;
};

struct Census {
  bool paused;  // a running row is
  std::int64_t free;
  std::vector<std::int64_t> ready;  // rows that the policy can decide now
};

class Batcher {
 public:
  Batcher(const EngineState& state, const EngineStage& stage, std::vector<PartPool> pools,
          std::vector<Vocabulary> vocabularies)
      : s_(state), out_(stage), pools_(std::move(pools)), vocabularies_(std::move(vocabularies)) {}

  Census census() const;

  // Takes all rows that a forward of `part` has something to do for, with pages for what they will write. False, with
  // nothing changed, when one of them needs more than free pages.
  bool schedule(std::int64_t part);

  // Of the rows taken, or of these: tokens [start, start + count) of each.
  BatchSizes lay_out(std::int64_t part);
  BatchSizes lay_out(std::int64_t part, const std::int64_t* rows, const std::int64_t* start, const std::int64_t* count,
                     std::int64_t n);

  // Every row has a number and is written by `model`, and no draft begins with it.
  bool plain(std::int64_t model, const std::int64_t* rows, const bool* finite, std::int64_t n) const;

  // Add a token to each row; the rows whose step ends with it.
  std::vector<StepEnd> append(std::int64_t model, const std::int64_t* rows, const std::int64_t* token,
                              const float* logprob, const float* entropy, std::int64_t n);

  // ints [3][n], floats [9][n]: what a policy sees of the rows.
  void boundary(const std::int64_t* rows, std::int64_t n, bool drafts, std::int64_t* ints, float* floats) const;

 private:
  struct Row {
    std::int64_t slot, start, count;
  };

  void check(std::int64_t part, const std::int64_t* rows, std::int64_t n) const;
  bool alike(std::int64_t n);
  void charge(std::int64_t part, std::int64_t slot, std::int64_t count, std::int64_t context) const;

  EngineState s_;
  EngineStage out_;
  std::vector<PartPool> pools_;
  std::vector<Vocabulary> vocabularies_;
  std::vector<Row> taken_;
  std::vector<std::int64_t> first_pages_;
};

}  // namespace roro
