// Rendered by `python -m xlpk.layout`; edit xlpk/layout.py instead.
#pragma once
#include <cstddef>
#include <cstdint>

namespace xl {

// Storage of a bf16 number: the upper half of a float.
struct bf16 {
  uint16_t bits;
};

// Storage of an IEEE half.
struct f16 {
  uint16_t bits;
};

constexpr int kLayoutVersion = 1;  // checked when a session opens
constexpr int kVirtualLanes = 32;  // every reduction runs over this many lanes and one fixed tree, whatever the team
constexpr int kAttentionSpan = 256;  // keys an attention partial covers; absolute positions; the page size divides it
constexpr int kMaxBlock = 16;  // most tokens one verify step may emit: 15 drafts and the bonus token
constexpr int kMaxStopIds = 8;  // stop token ids a request may carry
constexpr int kMaxLogprobs = 20;  // most likely tokens that are published beside a token, at most
constexpr int kMaxTarget = 16;  // token ids of a target at most
constexpr int kMaxBias = 1024;  // logit biases of a request at most
constexpr int kLine = 128;  // bytes between words that different agents write
constexpr int kGpuThreads = 256;  // threads of a team on a GPU
constexpr int kGpuLanes = 32;  // threads of a warp there
constexpr int kFlightEntries = 1024;  // last phases that the flight recorder keeps for a team; a power of two
constexpr int kWeightTileRows = 8;  // rows of a tile of weights
constexpr int kWeightTileColumns = 256;  // columns of a tile of weights

enum class WeightType : int32_t { kBf16 = 0, kFp32 = 1, kFp16 = 2 };
enum class WeightLayout : int32_t { kRows = 0, kTiles = 1 };
enum class SlotState : int32_t { kFree = 0, kPrefill = 1, kDecode = 2 };
enum class EventKind : int32_t { kAdmitted = 0, kToken = 1, kFinished = 2 };
enum class FinishReason : int32_t { kNone = 0, kEos = 1, kStop = 2, kLength = 3, kCancelled = 4, kError = 5, kTarget = 6 };
enum class Proposer : int32_t { kNone = 0, kNgram = 1, kOracle = 2 };
enum class Acceptance : int32_t { kKeyed = 0, kGreedy = 1, kForced = 2 };
enum class AbortReason : int32_t { kNone = 0, kHost = 1, kBarrierTimeout = 2, kPageDoubleAllocation = 3, kPageDoubleFree = 4, kPageConservation = 5, kNoFreePage = 6, kCensusTimeout = 7, kHang = 8 };
enum class LeaveReason : int32_t { kNone = 0, kStop = 1, kLease = 2, kIdle = 3, kHeartbeat = 4 };

enum class Phase : int32_t {
  kEmbed = 0,  // token embedding; RoPE angles; clears the samplers' maxima
  kQkv = 1,  // norm, Q K V projections, RoPE, K and V written to their pages
  kAttend = 2,  // attention partials, one a (row, KV head, span of 256 keys)
  kOutput = 3,  // merge of the partials, O projection, residual
  kGateUp = 4,  // norm, gate and up projections, SiLU
  kDown = 5,  // down projection, residual
  kLmHead = 6,  // final norm, logits, keyed sampling as a running maximum
  kFilter = 7,  // rows with top-k, top-p, min-p or logprobs only: threshold, keyed maximum of what is kept
  kControl = 8,  // one team: verify, commit, publish, admit, draft, plan the next step
};
constexpr int kPhases = 9;
#define XL_FORWARD_PHASES(X) X(embed, kEmbed) X(qkv, kQkv) X(attend, kAttend) X(output, kOutput) X(gate_up, kGateUp) X(down, kDown) X(lm_head, kLmHead) X(filter, kFilter)
constexpr int kFirstLayerPhase = 1;
constexpr int kLastLayerPhase = 5;

// The model's dimensions, under their Hugging Face names; on the GPU, compile-time constants of the same names.
struct Dims {
  int32_t vocab_size;  // tokens
  int32_t hidden_size;  // multiple of 32
  int32_t intermediate_size;  // multiple of 32
  int32_t num_hidden_layers;  // layers
  int32_t num_attention_heads;  // query heads
  int32_t num_key_value_heads;  // divides num_attention_heads
  int32_t head_dim;  // multiple of 16
  int32_t head_stride;  // head_dim up to a multiple of 32: how q, pages and partials hold a head
  int32_t page_size;  // tokens a KV page holds; divides 256
  float rms_norm_eps;
};
static_assert(sizeof(Dims) == 40, "Dims");
static_assert(offsetof(Dims, vocab_size) == 0, "Dims.vocab_size");
static_assert(offsetof(Dims, hidden_size) == 4, "Dims.hidden_size");
static_assert(offsetof(Dims, intermediate_size) == 8, "Dims.intermediate_size");
static_assert(offsetof(Dims, num_hidden_layers) == 12, "Dims.num_hidden_layers");
static_assert(offsetof(Dims, num_attention_heads) == 16, "Dims.num_attention_heads");
static_assert(offsetof(Dims, num_key_value_heads) == 20, "Dims.num_key_value_heads");
static_assert(offsetof(Dims, head_dim) == 24, "Dims.head_dim");
static_assert(offsetof(Dims, head_stride) == 28, "Dims.head_stride");
static_assert(offsetof(Dims, page_size) == 32, "Dims.page_size");
static_assert(offsetof(Dims, rms_norm_eps) == 36, "Dims.rms_norm_eps");

// One layer. Matrices are row-major [out, in] in the storage type of the model; norm vectors and biases are float.
struct LayerWeights {
  const float* input_layernorm;  // [hidden_size]
  const void* q_proj;  // [num_attention_heads * head_dim, hidden_size]
  const void* k_proj;  // [num_key_value_heads * head_dim, hidden_size]
  const void* v_proj;  // [num_key_value_heads * head_dim, hidden_size]
  const void* o_proj;  // [hidden_size, num_attention_heads * head_dim]
  const float* post_attention_layernorm;  // [hidden_size]
  const void* gate_proj;  // [intermediate_size, hidden_size]
  const void* up_proj;  // [intermediate_size, hidden_size]
  const void* down_proj;  // [hidden_size, intermediate_size]
  const float* q_bias;  // [num_attention_heads * head_dim]; null: none
  const float* k_bias;  // [num_key_value_heads * head_dim]; null: none
  const float* v_bias;  // [num_key_value_heads * head_dim]; null: none
  const float* o_bias;  // [hidden_size]; null: none
  const float* gate_bias;  // [intermediate_size]; null: none
  const float* up_bias;  // [intermediate_size]; null: none
  const float* down_bias;  // [hidden_size]; null: none
};
static_assert(sizeof(LayerWeights) == 128, "LayerWeights");
static_assert(offsetof(LayerWeights, input_layernorm) == 0, "LayerWeights.input_layernorm");
static_assert(offsetof(LayerWeights, q_proj) == 8, "LayerWeights.q_proj");
static_assert(offsetof(LayerWeights, k_proj) == 16, "LayerWeights.k_proj");
static_assert(offsetof(LayerWeights, v_proj) == 24, "LayerWeights.v_proj");
static_assert(offsetof(LayerWeights, o_proj) == 32, "LayerWeights.o_proj");
static_assert(offsetof(LayerWeights, post_attention_layernorm) == 40, "LayerWeights.post_attention_layernorm");
static_assert(offsetof(LayerWeights, gate_proj) == 48, "LayerWeights.gate_proj");
static_assert(offsetof(LayerWeights, up_proj) == 56, "LayerWeights.up_proj");
static_assert(offsetof(LayerWeights, down_proj) == 64, "LayerWeights.down_proj");
static_assert(offsetof(LayerWeights, q_bias) == 72, "LayerWeights.q_bias");
static_assert(offsetof(LayerWeights, k_bias) == 80, "LayerWeights.k_bias");
static_assert(offsetof(LayerWeights, v_bias) == 88, "LayerWeights.v_bias");
static_assert(offsetof(LayerWeights, o_bias) == 96, "LayerWeights.o_bias");
static_assert(offsetof(LayerWeights, gate_bias) == 104, "LayerWeights.gate_bias");
static_assert(offsetof(LayerWeights, up_bias) == 112, "LayerWeights.up_bias");
static_assert(offsetof(LayerWeights, down_bias) == 120, "LayerWeights.down_bias");

// A request as the host writes it into the submission ring; its tokens lie in the prompt ring.
struct Submission {
  uint64_t request_id;  // unique within a session
  uint64_t prompt_begin;  // running index of its first token in the prompt ring
  uint64_t seed;  // key of its sampling noise
  int32_t prompt_len;  // tokens, >= 1
  int32_t oracle_len;  // right answers behind the prompt in the prompt ring; n_bias pairs (id, float) follow
  int32_t max_new_tokens;  // >= 1; prompt_len + max_new_tokens <= Params.max_len
  int32_t ignore_eos;  // 0 or 1; end-of-sequence ids are not stop ids, they are Params.eos_ids
  int32_t n_stop_ids;  // 0..kMaxStopIds
  float temperature;  // 0: greedy
  int32_t top_k;  // 0: off
  float top_p;  // 1: off
  float min_p;  // 0: off
  float repetition_penalty;  // 1: off
  float presence_penalty;  // 0: off
  float frequency_penalty;  // 0: off
  int32_t n_logprobs;  // 0..kMaxLogprobs most likely tokens to publish beside each token; -1: none
  int32_t n_bias;  // logit biases
  int32_t n_target;  // 0..kMaxTarget; 0: none
  int32_t target[16];  // token ids; the request ends when its output ends with them
  int32_t stop_ids[8];  // token ids that end the output; the token itself is part of it
};
static_assert(sizeof(Submission) == 184, "Submission");
static_assert(offsetof(Submission, request_id) == 0, "Submission.request_id");
static_assert(offsetof(Submission, prompt_begin) == 8, "Submission.prompt_begin");
static_assert(offsetof(Submission, seed) == 16, "Submission.seed");
static_assert(offsetof(Submission, prompt_len) == 24, "Submission.prompt_len");
static_assert(offsetof(Submission, oracle_len) == 28, "Submission.oracle_len");
static_assert(offsetof(Submission, max_new_tokens) == 32, "Submission.max_new_tokens");
static_assert(offsetof(Submission, ignore_eos) == 36, "Submission.ignore_eos");
static_assert(offsetof(Submission, n_stop_ids) == 40, "Submission.n_stop_ids");
static_assert(offsetof(Submission, temperature) == 44, "Submission.temperature");
static_assert(offsetof(Submission, top_k) == 48, "Submission.top_k");
static_assert(offsetof(Submission, top_p) == 52, "Submission.top_p");
static_assert(offsetof(Submission, min_p) == 56, "Submission.min_p");
static_assert(offsetof(Submission, repetition_penalty) == 60, "Submission.repetition_penalty");
static_assert(offsetof(Submission, presence_penalty) == 64, "Submission.presence_penalty");
static_assert(offsetof(Submission, frequency_penalty) == 68, "Submission.frequency_penalty");
static_assert(offsetof(Submission, n_logprobs) == 72, "Submission.n_logprobs");
static_assert(offsetof(Submission, n_bias) == 76, "Submission.n_bias");
static_assert(offsetof(Submission, n_target) == 80, "Submission.n_target");
static_assert(offsetof(Submission, target) == 84, "Submission.target");
static_assert(offsetof(Submission, stop_ids) == 148, "Submission.stop_ids");

// What the device publishes about a request, in order, in the event ring.
struct Event {
  uint64_t request_id;
  uint64_t step;  // the step that produced it
  uint64_t device_ns;  // device clock when it was published
  int32_t kind;  // EventKind
  int32_t token;  // TOKEN: its id
  int32_t output_index;  // TOKEN: 0 for the first output token; FINISHED: number of output tokens
  int32_t reason;  // FINISHED: FinishReason
  int32_t n_drafts;  // first TOKEN of a verification: drafts verified; else -1
  int32_t n_accepted;  // likewise, accepted; the last token of an output is not counted
  int32_t n_logprobs;  // TOKEN: -1, or Params.logprobs has an entry at the same place of the ring
  int32_t reserved;  // 0
};
static_assert(sizeof(Event) == 56, "Event");
static_assert(offsetof(Event, request_id) == 0, "Event.request_id");
static_assert(offsetof(Event, step) == 8, "Event.step");
static_assert(offsetof(Event, device_ns) == 16, "Event.device_ns");
static_assert(offsetof(Event, kind) == 24, "Event.kind");
static_assert(offsetof(Event, token) == 28, "Event.token");
static_assert(offsetof(Event, output_index) == 32, "Event.output_index");
static_assert(offsetof(Event, reason) == 36, "Event.reason");
static_assert(offsetof(Event, n_drafts) == 40, "Event.n_drafts");
static_assert(offsetof(Event, n_accepted) == 44, "Event.n_accepted");
static_assert(offsetof(Event, n_logprobs) == 48, "Event.n_logprobs");
static_assert(offsetof(Event, reserved) == 52, "Event.reserved");

// Log-probabilities of the model's own logits at one position, before bias, penalties and temperature.
struct Logprobs {
  int32_t n;  // valid entries of ids and values; -1: none were asked for
  float token;  // of the token that was emitted
  float log_sum;  // log of the sum of exp(logit)
  float keyed;  // logit of the keyed sample
  float greedy;  // logit of the argmax after bias and penalties
  int32_t ids[20];  // most likely first; ties by id
  float values[20];
};
static_assert(sizeof(Logprobs) == 180, "Logprobs");
static_assert(offsetof(Logprobs, n) == 0, "Logprobs.n");
static_assert(offsetof(Logprobs, token) == 4, "Logprobs.token");
static_assert(offsetof(Logprobs, log_sum) == 8, "Logprobs.log_sum");
static_assert(offsetof(Logprobs, keyed) == 12, "Logprobs.keyed");
static_assert(offsetof(Logprobs, greedy) == 16, "Logprobs.greedy");
static_assert(offsetof(Logprobs, ids) == 20, "Logprobs.ids");
static_assert(offsetof(Logprobs, values) == 100, "Logprobs.values");

// What a step did and the state it left, published in the step ring when it was committed.
struct StepRecord {
  uint64_t step;  // 1 for the first step of the session
  uint64_t begin_ns;  // device clock when the step was planned
  uint64_t end_ns;  // device clock when it was committed
  int32_t n_rows;  // rows of the step
  int32_t n_prefill_rows;
  int32_t n_decode_rows;
  int32_t n_draft_rows;
  int32_t n_sample_rows;  // rows that reached the LM head
  int32_t n_accepted;  // drafts accepted
  int32_t n_tokens;  // tokens emitted
  int32_t n_waiting;  // requests in the submission ring
  int32_t n_prefill;  // requests that had prefill rows in the step
  int32_t n_decode;  // requests that had a decode row in the step
  int32_t n_finished;  // requests that the step finished
  int32_t pages_total;  // conservation: free + active + draft = total
  int32_t pages_free;  // while the step ran
  int32_t pages_active;  // hold or will hold committed tokens
  int32_t pages_draft;  // hold unverified tokens only
  int32_t pages_locked;  // part of active that belongs to requests with rows in the step
  int32_t context_tokens;  // tokens whose K and V the step had to read, once a request, its own rows included
  int32_t live_tokens;  // committed tokens whose K and V are stored, after the step
  int32_t live_pages;  // pages that hold them, after the step
  uint64_t phase_ns[9];  // device time a phase took, barrier included, summed over layers
};
static_assert(sizeof(StepRecord) == 176, "StepRecord");
static_assert(offsetof(StepRecord, step) == 0, "StepRecord.step");
static_assert(offsetof(StepRecord, begin_ns) == 8, "StepRecord.begin_ns");
static_assert(offsetof(StepRecord, end_ns) == 16, "StepRecord.end_ns");
static_assert(offsetof(StepRecord, n_rows) == 24, "StepRecord.n_rows");
static_assert(offsetof(StepRecord, n_prefill_rows) == 28, "StepRecord.n_prefill_rows");
static_assert(offsetof(StepRecord, n_decode_rows) == 32, "StepRecord.n_decode_rows");
static_assert(offsetof(StepRecord, n_draft_rows) == 36, "StepRecord.n_draft_rows");
static_assert(offsetof(StepRecord, n_sample_rows) == 40, "StepRecord.n_sample_rows");
static_assert(offsetof(StepRecord, n_accepted) == 44, "StepRecord.n_accepted");
static_assert(offsetof(StepRecord, n_tokens) == 48, "StepRecord.n_tokens");
static_assert(offsetof(StepRecord, n_waiting) == 52, "StepRecord.n_waiting");
static_assert(offsetof(StepRecord, n_prefill) == 56, "StepRecord.n_prefill");
static_assert(offsetof(StepRecord, n_decode) == 60, "StepRecord.n_decode");
static_assert(offsetof(StepRecord, n_finished) == 64, "StepRecord.n_finished");
static_assert(offsetof(StepRecord, pages_total) == 68, "StepRecord.pages_total");
static_assert(offsetof(StepRecord, pages_free) == 72, "StepRecord.pages_free");
static_assert(offsetof(StepRecord, pages_active) == 76, "StepRecord.pages_active");
static_assert(offsetof(StepRecord, pages_draft) == 80, "StepRecord.pages_draft");
static_assert(offsetof(StepRecord, pages_locked) == 84, "StepRecord.pages_locked");
static_assert(offsetof(StepRecord, context_tokens) == 88, "StepRecord.context_tokens");
static_assert(offsetof(StepRecord, live_tokens) == 92, "StepRecord.live_tokens");
static_assert(offsetof(StepRecord, live_pages) == 96, "StepRecord.live_pages");
static_assert(offsetof(StepRecord, phase_ns) == 104, "StepRecord.phase_ns");

// One token of the ragged step.
struct Row {
  int32_t slot;
  int32_t position;  // 0-based position in its sequence
  int32_t token;  // its id
  int32_t sample_row;  // index among the rows that reach the LM head; -1: none
};
static_assert(sizeof(Row) == 16, "Row");
static_assert(offsetof(Row, slot) == 0, "Row.slot");
static_assert(offsetof(Row, position) == 4, "Row.position");
static_assert(offsetof(Row, token) == 8, "Row.token");
static_assert(offsetof(Row, sample_row) == 12, "Row.sample_row");

// The step descriptor: all that phases read besides weights, activations and pages.
struct Step {
  uint64_t step;  // its number
  uint64_t begin_ns;  // device clock when it was planned
  int32_t n_rows;  // 0: nothing to do
  int32_t n_sample_rows;
  int32_t n_filter_rows;  // sampled rows of slots that are filtered; 0: the filter phase is left out
  int32_t n_prefill_rows;
  int32_t n_decode_rows;
  int32_t n_draft_rows;
  int32_t n_prefill;  // requests
  int32_t n_decode;  // requests
  int32_t leave;  // LeaveReason; not NONE: the loop leaves instead of running a step
  int32_t n_page_patches;  // launched from the host: changes of the page table, the first of Params.patches
  int32_t n_count_patches;  // launched from the host: changes of Params.counts, behind them
};
static_assert(sizeof(Step) == 64, "Step");
static_assert(offsetof(Step, step) == 0, "Step.step");
static_assert(offsetof(Step, begin_ns) == 8, "Step.begin_ns");
static_assert(offsetof(Step, n_rows) == 16, "Step.n_rows");
static_assert(offsetof(Step, n_sample_rows) == 20, "Step.n_sample_rows");
static_assert(offsetof(Step, n_filter_rows) == 24, "Step.n_filter_rows");
static_assert(offsetof(Step, n_prefill_rows) == 28, "Step.n_prefill_rows");
static_assert(offsetof(Step, n_decode_rows) == 32, "Step.n_decode_rows");
static_assert(offsetof(Step, n_draft_rows) == 36, "Step.n_draft_rows");
static_assert(offsetof(Step, n_prefill) == 40, "Step.n_prefill");
static_assert(offsetof(Step, n_decode) == 44, "Step.n_decode");
static_assert(offsetof(Step, leave) == 48, "Step.leave");
static_assert(offsetof(Step, n_page_patches) == 52, "Step.n_page_patches");
static_assert(offsetof(Step, n_count_patches) == 56, "Step.n_count_patches");

// The device's state of one running request. Its tokens are Params.tokens[slot], prompt then output.
struct Slot {
  uint64_t request_id;
  uint64_t seed;
  int32_t state;  // SlotState
  int32_t prompt_len;  // tokens
  int32_t length;  // tokens known: prompt and committed output
  int32_t computed;  // tokens whose K and V are stored; length - 1 while decoding
  int32_t max_new_tokens;
  int32_t ignore_eos;
  int32_t n_stop_ids;
  float temperature;  // 0: greedy
  int32_t top_k;  // 0: off
  float top_p;  // 1: off
  float min_p;  // 0: off
  float repetition_penalty;  // 1: off
  float presence_penalty;  // 0: off
  float frequency_penalty;  // 0: off
  int32_t n_logprobs;  // 0..kMaxLogprobs most likely tokens to publish beside each token; -1: none
  int32_t n_bias;  // logit biases
  int32_t n_target;  // 0..kMaxTarget; 0: none
  int32_t target[16];  // token ids; the request ends when its output ends with them
  int32_t adjusted;  // 1: its logits get a bias or penalties
  int32_t penalized;  // 1: Params.counts[slot] is kept
  int32_t filtered;  // 1: its sampled rows go through the filter phase
  int32_t stop_ids[8];
  int32_t oracle_len;  // valid entries of Params.oracle[slot]
  int32_t n_pages;  // entries of Params.page_table[slot]
  int32_t reserved_pages;  // pages it may come to need: promised at admission, so that it can always go on
  int32_t row_begin;  // its rows in the step
  int32_t row_count;  // 0: none in this step
  int32_t n_drafts;  // drafts among them, behind the decode row
  int32_t n_accepted;  // set by verification
  int32_t n_emitted;  // tokens that verification found: accepted drafts and one more
  int32_t drafts[16];  // proposed tokens
  int32_t emitted[16];  // token ids
};
static_assert(sizeof(Slot) == 352, "Slot");
static_assert(offsetof(Slot, request_id) == 0, "Slot.request_id");
static_assert(offsetof(Slot, seed) == 8, "Slot.seed");
static_assert(offsetof(Slot, state) == 16, "Slot.state");
static_assert(offsetof(Slot, prompt_len) == 20, "Slot.prompt_len");
static_assert(offsetof(Slot, length) == 24, "Slot.length");
static_assert(offsetof(Slot, computed) == 28, "Slot.computed");
static_assert(offsetof(Slot, max_new_tokens) == 32, "Slot.max_new_tokens");
static_assert(offsetof(Slot, ignore_eos) == 36, "Slot.ignore_eos");
static_assert(offsetof(Slot, n_stop_ids) == 40, "Slot.n_stop_ids");
static_assert(offsetof(Slot, temperature) == 44, "Slot.temperature");
static_assert(offsetof(Slot, top_k) == 48, "Slot.top_k");
static_assert(offsetof(Slot, top_p) == 52, "Slot.top_p");
static_assert(offsetof(Slot, min_p) == 56, "Slot.min_p");
static_assert(offsetof(Slot, repetition_penalty) == 60, "Slot.repetition_penalty");
static_assert(offsetof(Slot, presence_penalty) == 64, "Slot.presence_penalty");
static_assert(offsetof(Slot, frequency_penalty) == 68, "Slot.frequency_penalty");
static_assert(offsetof(Slot, n_logprobs) == 72, "Slot.n_logprobs");
static_assert(offsetof(Slot, n_bias) == 76, "Slot.n_bias");
static_assert(offsetof(Slot, n_target) == 80, "Slot.n_target");
static_assert(offsetof(Slot, target) == 84, "Slot.target");
static_assert(offsetof(Slot, adjusted) == 148, "Slot.adjusted");
static_assert(offsetof(Slot, penalized) == 152, "Slot.penalized");
static_assert(offsetof(Slot, filtered) == 156, "Slot.filtered");
static_assert(offsetof(Slot, stop_ids) == 160, "Slot.stop_ids");
static_assert(offsetof(Slot, oracle_len) == 192, "Slot.oracle_len");
static_assert(offsetof(Slot, n_pages) == 196, "Slot.n_pages");
static_assert(offsetof(Slot, reserved_pages) == 200, "Slot.reserved_pages");
static_assert(offsetof(Slot, row_begin) == 204, "Slot.row_begin");
static_assert(offsetof(Slot, row_count) == 208, "Slot.row_count");
static_assert(offsetof(Slot, n_drafts) == 212, "Slot.n_drafts");
static_assert(offsetof(Slot, n_accepted) == 216, "Slot.n_accepted");
static_assert(offsetof(Slot, n_emitted) == 220, "Slot.n_emitted");
static_assert(offsetof(Slot, drafts) == 224, "Slot.drafts");
static_assert(offsetof(Slot, emitted) == 288, "Slot.emitted");

// Scalars of the control plane; only the controlling team touches them.
struct LoopState {
  uint64_t n_steps;  // steps planned so far
  uint64_t prompt_head;  // prompt ring: next token to take
  uint64_t submit_head;  // next submission to look at
  uint64_t cancel_head;  // next cancellation to look at
  uint64_t event_tail;  // events written, published at the end of control
  uint64_t step_tail;  // step records written
  int32_t n_free_pages;  // entries of Params.free_pages; set by the host to all
  int32_t n_reserved_pages;  // sum of Slot.reserved_pages
  int32_t n_order;  // running requests: entries of Params.order, oldest first
  int32_t admitted_slot;  // slot whose tokens the team copies; -1: none
  int32_t draft_rows;  // rows that drafts of the next step may take; -1: no step can be planned now
  uint64_t phase_ticks[9];  // of the step in flight, by clock_ticks of who ran the phase
  uint64_t span_ns;  // global time in which the forward phases' clock counted span_ticks
  uint64_t span_ticks;  // 0: their ticks are nanoseconds
  uint64_t n_launches;  // launches of the persistent loop
  uint64_t launched_ns;  // device clock when this launch began
  uint64_t busy_ns;  // device clock when there was work last
  uint64_t beat;  // the host's heartbeat as it was seen last
  uint64_t beat_ns;  // device clock when it changed
  uint64_t n_rounds;  // rounds of control
  uint64_t n_left;  // launches that ended
  uint64_t pong;  // ping that was answered last
};
static_assert(sizeof(LoopState) == 224, "LoopState");
static_assert(offsetof(LoopState, n_steps) == 0, "LoopState.n_steps");
static_assert(offsetof(LoopState, prompt_head) == 8, "LoopState.prompt_head");
static_assert(offsetof(LoopState, submit_head) == 16, "LoopState.submit_head");
static_assert(offsetof(LoopState, cancel_head) == 24, "LoopState.cancel_head");
static_assert(offsetof(LoopState, event_tail) == 32, "LoopState.event_tail");
static_assert(offsetof(LoopState, step_tail) == 40, "LoopState.step_tail");
static_assert(offsetof(LoopState, n_free_pages) == 48, "LoopState.n_free_pages");
static_assert(offsetof(LoopState, n_reserved_pages) == 52, "LoopState.n_reserved_pages");
static_assert(offsetof(LoopState, n_order) == 56, "LoopState.n_order");
static_assert(offsetof(LoopState, admitted_slot) == 60, "LoopState.admitted_slot");
static_assert(offsetof(LoopState, draft_rows) == 64, "LoopState.draft_rows");
static_assert(offsetof(LoopState, phase_ticks) == 72, "LoopState.phase_ticks");
static_assert(offsetof(LoopState, span_ns) == 144, "LoopState.span_ns");
static_assert(offsetof(LoopState, span_ticks) == 152, "LoopState.span_ticks");
static_assert(offsetof(LoopState, n_launches) == 160, "LoopState.n_launches");
static_assert(offsetof(LoopState, launched_ns) == 168, "LoopState.launched_ns");
static_assert(offsetof(LoopState, busy_ns) == 176, "LoopState.busy_ns");
static_assert(offsetof(LoopState, beat) == 184, "LoopState.beat");
static_assert(offsetof(LoopState, beat_ns) == 192, "LoopState.beat_ns");
static_assert(offsetof(LoopState, n_rounds) == 200, "LoopState.n_rounds");
static_assert(offsetof(LoopState, n_left) == 208, "LoopState.n_left");
static_assert(offsetof(LoopState, pong) == 216, "LoopState.pong");

// A word of the page table or of the counts that changed since the device had them.
struct Patch {
  int32_t index;  // of the word in its array
  int32_t value;
};
static_assert(sizeof(Patch) == 8, "Patch");
static_assert(offsetof(Patch, index) == 0, "Patch.index");
static_assert(offsetof(Patch, value) == 4, "Patch.value");

// What a team was about to do, in its ring of kFlightEntries.
struct FlightEntry {
  uint64_t clock_ns;  // device clock; 0: never written
  uint32_t step;  // lowest bits of its number
  uint16_t phase;  // Phase
  uint16_t layer;
};
static_assert(sizeof(FlightEntry) == 16, "FlightEntry");
static_assert(offsetof(FlightEntry, clock_ns) == 0, "FlightEntry.clock_ns");
static_assert(offsetof(FlightEntry, step) == 8, "FlightEntry.step");
static_assert(offsetof(FlightEntry, phase) == 12, "FlightEntry.phase");
static_assert(offsetof(FlightEntry, layer) == 14, "FlightEntry.layer");

// Words that host and device write for each other; each writer's words share no line with another's.
struct Mailbox {
  uint64_t submit_tail;  // host: submissions written
  uint64_t cancel_tail;  // host: cancellations written
  uint64_t event_head;  // host: events taken
  uint64_t step_head;  // host: step records taken
  uint64_t prompt_tail;  // host: prompt tokens written
  uint64_t heartbeat;  // host: changes while the host is alive
  uint64_t ping;  // host: asks an idle loop for its clock
  uint64_t stop;  // host: 1 asks the loop to leave
  uint32_t launches;  // host: launches of the loop
  uint32_t hang;  // watchdog: 1 says that nothing moves
  uint8_t host_pad[56];
  uint64_t submit_head;  // device: submissions taken
  uint64_t cancel_head;  // device: cancellations taken
  uint64_t event_tail;  // device: events published; on 16 bytes with the next: one store
  uint64_t step_tail;  // device: step records published
  uint64_t prompt_head;  // device: prompt tokens taken
  uint32_t abort;  // device: AbortReason, copied from GridState for the host
  uint32_t abort_team;  // device: the team that gave up first
  uint64_t progress;  // device: rounds of control so far
  uint64_t n_left;  // device: launches that ended with their state kept
  uint64_t pong_ns;  // device: its clock, answering `ping`
  uint64_t pong;  // device: the `ping` that was answered
  uint32_t leave;  // device: LeaveReason of the launch that ended last
  uint32_t running;  // device: requests with a slot
  uint8_t device_pad[40];
};
static_assert(sizeof(Mailbox) == 256, "Mailbox");
static_assert(offsetof(Mailbox, submit_tail) == 0, "Mailbox.submit_tail");
static_assert(offsetof(Mailbox, cancel_tail) == 8, "Mailbox.cancel_tail");
static_assert(offsetof(Mailbox, event_head) == 16, "Mailbox.event_head");
static_assert(offsetof(Mailbox, step_head) == 24, "Mailbox.step_head");
static_assert(offsetof(Mailbox, prompt_tail) == 32, "Mailbox.prompt_tail");
static_assert(offsetof(Mailbox, heartbeat) == 40, "Mailbox.heartbeat");
static_assert(offsetof(Mailbox, ping) == 48, "Mailbox.ping");
static_assert(offsetof(Mailbox, stop) == 56, "Mailbox.stop");
static_assert(offsetof(Mailbox, launches) == 64, "Mailbox.launches");
static_assert(offsetof(Mailbox, hang) == 68, "Mailbox.hang");
static_assert(offsetof(Mailbox, host_pad) == 72, "Mailbox.host_pad");
static_assert(offsetof(Mailbox, submit_head) == 128, "Mailbox.submit_head");
static_assert(offsetof(Mailbox, cancel_head) == 136, "Mailbox.cancel_head");
static_assert(offsetof(Mailbox, event_tail) == 144, "Mailbox.event_tail");
static_assert(offsetof(Mailbox, step_tail) == 152, "Mailbox.step_tail");
static_assert(offsetof(Mailbox, prompt_head) == 160, "Mailbox.prompt_head");
static_assert(offsetof(Mailbox, abort) == 168, "Mailbox.abort");
static_assert(offsetof(Mailbox, abort_team) == 172, "Mailbox.abort_team");
static_assert(offsetof(Mailbox, progress) == 176, "Mailbox.progress");
static_assert(offsetof(Mailbox, n_left) == 184, "Mailbox.n_left");
static_assert(offsetof(Mailbox, pong_ns) == 192, "Mailbox.pong_ns");
static_assert(offsetof(Mailbox, pong) == 200, "Mailbox.pong");
static_assert(offsetof(Mailbox, leave) == 208, "Mailbox.leave");
static_assert(offsetof(Mailbox, running) == 212, "Mailbox.running");
static_assert(offsetof(Mailbox, device_pad) == 216, "Mailbox.device_pad");

// Words that teams share with each other only.
struct GridState {
  uint64_t arrivals;  // at the grid barrier since the start; never reset
  uint8_t arrivals_pad[120];
  uint32_t abort;  // AbortReason; the first one written stays
  uint8_t abort_pad[124];
};
static_assert(sizeof(GridState) == 256, "GridState");
static_assert(offsetof(GridState, arrivals) == 0, "GridState.arrivals");
static_assert(offsetof(GridState, arrivals_pad) == 8, "GridState.arrivals_pad");
static_assert(offsetof(GridState, abort) == 128, "GridState.abort");
static_assert(offsetof(GridState, abort_pad) == 132, "GridState.abort_pad");

// All addresses and policies of a session, passed to every kernel.
struct Params {
  const void* embed_tokens;  // [vocab_size, hidden_size]
  const void* lm_head;  // [vocab_size, hidden_size]; embed_tokens when tied
  const float* norm;  // [hidden_size]
  const LayerWeights* layers;  // [num_hidden_layers]
  const double* inv_freq;  // RoPE frequencies, [head_dim / 2]
  const int32_t* eos_ids;  // [n_eos_ids]
  void* kv;  // [layers, pages, 2 (K, V), num_key_value_heads, page_size, head_stride]
  float* x;  // residual stream, [max_rows, hidden_size]
  float* q;  // rotated queries, [max_rows, num_attention_heads, head_stride]
  float* span_max;  // largest score, [max_rows, num_attention_heads, max_spans]
  float* span_sum;  // sum of exp(score - max), the same shape
  float* span_acc;  // weighted V, [max_rows, num_attention_heads, max_spans, head_stride]
  void* act;  // SiLU(gate) * up, [max_rows, intermediate_size]; bf16 where weights are, else float
  float* rope;  // cosines then sines, [max_rows, 2, head_dim / 2]
  uint64_t* best;  // packed (value, ~token) maxima: keyed sample, argmax; [max_rows, 2]
  float* logits;  // null, or [max_len, vocab_size] by position, of slot 0 (tests)
  float* processed;  // logits after bias and penalties of filtered rows, [max_rows, vocab_size] by sampled row
  float* raw;  // the model's own logits, where logprobs are asked for; the same shape
  Logprobs* row_logprobs;  // by sampled row, [max_rows]
  int32_t* counts;  // of output tokens, kSeenInPrompt added for the prompt's; [max_slots, vocab_size]
  float* bias;  // [max_slots, vocab_size]
  float* scratch;  // CPU only: [teams, scratch_floats]; the GPU has shared memory
  Mailbox* mailbox;
  GridState* grid;
  Submission* submissions;  // [submission_capacity]
  int32_t* prompts;  // [prompt_capacity]
  uint64_t* cancels;  // request ids, [submission_capacity]
  uint8_t* cancelled;  // device's marks on waiting submissions, [submission_capacity]
  Event* events;  // [event_capacity]
  Logprobs* logprobs;  // beside `events`, of TOKEN events whose request asks for them; [event_capacity]
  StepRecord* step_records;  // [step_capacity]
  LoopState* state;
  Step* step;
  StepRecord* record;  // of the step in flight
  Row* rows;  // [max_rows]
  int32_t* sample_rows;  // row of each sampled row, [max_rows]
  Slot* slots;  // [max_slots]
  int32_t* order;  // running slots, oldest admission first, [max_slots]
  int32_t* tokens;  // [max_slots, max_len]
  int32_t* oracle;  // right output tokens, [max_slots, max_len]
  int32_t* page_table;  // [max_slots, max_slot_pages]
  int32_t* free_pages;  // a stack, [n_pages]
  int32_t* page_owner;  // slot, or -1: free; [n_pages]
  FlightEntry* flight;  // null, or the flight recorder, [teams, kFlightEntries]
  Patch* patches;  // launched from the host: changes of the page table, then of the counts
  uint64_t spin_deadline_ns;  // a wait that lasts longer aborts the loop
  uint64_t census_ns;  // the first wait of a launch: all teams must have started
  uint64_t lease_ns;  // a launch leaves after this long with its state kept; 0: never
  uint64_t idle_ns;  // a launch leaves after this long without work; 0: never
  uint64_t heartbeat_ns;  // a launch leaves when the host's heartbeat stood still for this long; 0: never
  int32_t version;  // kLayoutVersion
  int32_t max_rows;  // rows of a step at most
  int32_t max_slots;  // requests that run at once
  int32_t max_len;  // tokens of a sequence at most
  int32_t max_spans;  // ceil(max_len / kAttentionSpan)
  int32_t max_slot_pages;  // ceil(max_len / page_size)
  int32_t n_pages;
  int32_t n_eos_ids;
  int32_t scratch_floats;  // floats of scratch a team has
  int32_t submission_capacity;  // power of two
  int32_t prompt_capacity;  // power of two, tokens
  int32_t event_capacity;  // power of two
  int32_t step_capacity;  // power of two
  int32_t prefill_chunk;  // prompt tokens of one request in one step at most
  int32_t block;  // most tokens a verification may emit: drafts + 1
  int32_t proposer;  // Proposer
  int32_t acceptance;  // Acceptance
  int32_t ngram_min;  // shortest suffix that is looked up
  int32_t ngram_max;  // longest suffix that is looked up
  int32_t mismatch_stride;  // oracle: output positions p with (p + 1) % stride == 0 get a wrong draft; 0: never
  int32_t forced_stride;  // forced acceptance rejects drafts at output positions p with (p + 1) % stride == 0
};
static_assert(sizeof(Params) == 488, "Params");
static_assert(offsetof(Params, embed_tokens) == 0, "Params.embed_tokens");
static_assert(offsetof(Params, lm_head) == 8, "Params.lm_head");
static_assert(offsetof(Params, norm) == 16, "Params.norm");
static_assert(offsetof(Params, layers) == 24, "Params.layers");
static_assert(offsetof(Params, inv_freq) == 32, "Params.inv_freq");
static_assert(offsetof(Params, eos_ids) == 40, "Params.eos_ids");
static_assert(offsetof(Params, kv) == 48, "Params.kv");
static_assert(offsetof(Params, x) == 56, "Params.x");
static_assert(offsetof(Params, q) == 64, "Params.q");
static_assert(offsetof(Params, span_max) == 72, "Params.span_max");
static_assert(offsetof(Params, span_sum) == 80, "Params.span_sum");
static_assert(offsetof(Params, span_acc) == 88, "Params.span_acc");
static_assert(offsetof(Params, act) == 96, "Params.act");
static_assert(offsetof(Params, rope) == 104, "Params.rope");
static_assert(offsetof(Params, best) == 112, "Params.best");
static_assert(offsetof(Params, logits) == 120, "Params.logits");
static_assert(offsetof(Params, processed) == 128, "Params.processed");
static_assert(offsetof(Params, raw) == 136, "Params.raw");
static_assert(offsetof(Params, row_logprobs) == 144, "Params.row_logprobs");
static_assert(offsetof(Params, counts) == 152, "Params.counts");
static_assert(offsetof(Params, bias) == 160, "Params.bias");
static_assert(offsetof(Params, scratch) == 168, "Params.scratch");
static_assert(offsetof(Params, mailbox) == 176, "Params.mailbox");
static_assert(offsetof(Params, grid) == 184, "Params.grid");
static_assert(offsetof(Params, submissions) == 192, "Params.submissions");
static_assert(offsetof(Params, prompts) == 200, "Params.prompts");
static_assert(offsetof(Params, cancels) == 208, "Params.cancels");
static_assert(offsetof(Params, cancelled) == 216, "Params.cancelled");
static_assert(offsetof(Params, events) == 224, "Params.events");
static_assert(offsetof(Params, logprobs) == 232, "Params.logprobs");
static_assert(offsetof(Params, step_records) == 240, "Params.step_records");
static_assert(offsetof(Params, state) == 248, "Params.state");
static_assert(offsetof(Params, step) == 256, "Params.step");
static_assert(offsetof(Params, record) == 264, "Params.record");
static_assert(offsetof(Params, rows) == 272, "Params.rows");
static_assert(offsetof(Params, sample_rows) == 280, "Params.sample_rows");
static_assert(offsetof(Params, slots) == 288, "Params.slots");
static_assert(offsetof(Params, order) == 296, "Params.order");
static_assert(offsetof(Params, tokens) == 304, "Params.tokens");
static_assert(offsetof(Params, oracle) == 312, "Params.oracle");
static_assert(offsetof(Params, page_table) == 320, "Params.page_table");
static_assert(offsetof(Params, free_pages) == 328, "Params.free_pages");
static_assert(offsetof(Params, page_owner) == 336, "Params.page_owner");
static_assert(offsetof(Params, flight) == 344, "Params.flight");
static_assert(offsetof(Params, patches) == 352, "Params.patches");
static_assert(offsetof(Params, spin_deadline_ns) == 360, "Params.spin_deadline_ns");
static_assert(offsetof(Params, census_ns) == 368, "Params.census_ns");
static_assert(offsetof(Params, lease_ns) == 376, "Params.lease_ns");
static_assert(offsetof(Params, idle_ns) == 384, "Params.idle_ns");
static_assert(offsetof(Params, heartbeat_ns) == 392, "Params.heartbeat_ns");
static_assert(offsetof(Params, version) == 400, "Params.version");
static_assert(offsetof(Params, max_rows) == 404, "Params.max_rows");
static_assert(offsetof(Params, max_slots) == 408, "Params.max_slots");
static_assert(offsetof(Params, max_len) == 412, "Params.max_len");
static_assert(offsetof(Params, max_spans) == 416, "Params.max_spans");
static_assert(offsetof(Params, max_slot_pages) == 420, "Params.max_slot_pages");
static_assert(offsetof(Params, n_pages) == 424, "Params.n_pages");
static_assert(offsetof(Params, n_eos_ids) == 428, "Params.n_eos_ids");
static_assert(offsetof(Params, scratch_floats) == 432, "Params.scratch_floats");
static_assert(offsetof(Params, submission_capacity) == 436, "Params.submission_capacity");
static_assert(offsetof(Params, prompt_capacity) == 440, "Params.prompt_capacity");
static_assert(offsetof(Params, event_capacity) == 444, "Params.event_capacity");
static_assert(offsetof(Params, step_capacity) == 448, "Params.step_capacity");
static_assert(offsetof(Params, prefill_chunk) == 452, "Params.prefill_chunk");
static_assert(offsetof(Params, block) == 456, "Params.block");
static_assert(offsetof(Params, proposer) == 460, "Params.proposer");
static_assert(offsetof(Params, acceptance) == 464, "Params.acceptance");
static_assert(offsetof(Params, ngram_min) == 468, "Params.ngram_min");
static_assert(offsetof(Params, ngram_max) == 472, "Params.ngram_max");
static_assert(offsetof(Params, mismatch_stride) == 476, "Params.mismatch_stride");
static_assert(offsetof(Params, forced_stride) == 480, "Params.forced_stride");

#if defined(XL_VOCAB_SIZE)
// The model's dimensions as compile-time constants, from -D definitions (see toolchain.dims_defines).
struct ModelDims {
  using Weight = XL_WEIGHT_TYPE;
  using Cache = XL_CACHE_TYPE;
  static constexpr WeightLayout weight_layout = WeightLayout(XL_WEIGHT_LAYOUT);
  static constexpr int32_t vocab_size = XL_VOCAB_SIZE;
  static constexpr int32_t hidden_size = XL_HIDDEN_SIZE;
  static constexpr int32_t intermediate_size = XL_INTERMEDIATE_SIZE;
  static constexpr int32_t num_hidden_layers = XL_NUM_HIDDEN_LAYERS;
  static constexpr int32_t num_attention_heads = XL_NUM_ATTENTION_HEADS;
  static constexpr int32_t num_key_value_heads = XL_NUM_KEY_VALUE_HEADS;
  static constexpr int32_t head_dim = XL_HEAD_DIM;
  static constexpr int32_t head_stride = XL_HEAD_STRIDE;
  static constexpr int32_t page_size = XL_PAGE_SIZE;
  static constexpr float rms_norm_eps = XL_RMS_NORM_EPS;
};
#endif

}  // namespace xl
