// Rendered by `python -m xlpk.layout`; edit xlpk/layout/ instead.
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

constexpr int kLayoutVersion = 3;  // checked when a session opens
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
constexpr int kWatermark = 100;  // beside others a request is admitted only if one page in this many stays (vLLM's watermark)
constexpr int kTokensPerLevel = 16;  // prompt tokens that count as one level under Policy.SHORTEST_PROMPT
constexpr int kProtectedShare = 5;  // eviction list 1 of SLRU holds at most all pages but one in this many
constexpr int kCostKnots = 12;  // rows of a step for which a simulated cost is given: 1, 2, 4, ...

enum class WeightType : int32_t { kBf16 = 0, kFp32 = 1, kFp16 = 2 };
enum class WeightLayout : int32_t { kRows = 0, kTiles = 1 };
enum class SlotState : int32_t { kFree = 0, kPrefill = 1, kDecode = 2, kWaiting = 3, kPreempted = 4 };
enum class EventKind : int32_t { kAdmitted = 0, kToken = 1, kFinished = 2, kPreempted = 3, kResumed = 4 };
enum class FinishReason : int32_t { kNone = 0, kEos = 1, kStop = 2, kLength = 3, kCancelled = 4, kError = 5, kTarget = 6, kDeadline = 7 };
enum class Proposer : int32_t { kNone = 0, kNgram = 1, kOracle = 2 };
enum class Acceptance : int32_t { kKeyed = 0, kGreedy = 1, kForced = 2 };
enum class Policy : int32_t { kFcfs = 0, kPriority = 1, kShortestPrompt = 2 };
enum class Eviction : int32_t { kLru = 0, kFifo = 1, kSlru = 2 };
enum class AbortReason : int32_t { kNone = 0, kHost = 1, kBarrierTimeout = 2, kPageDoubleAllocation = 3, kPageDoubleFree = 4, kPageConservation = 5, kNoFreePage = 6, kCensusTimeout = 7, kHang = 8 };
enum class LeaveReason : int32_t { kNone = 0, kStop = 1, kLease = 2, kIdle = 3, kHeartbeat = 4 };
enum class Router : int32_t { kRoundRobin = 0, kLeastOutstanding = 1, kPrefixAffinity = 2 };
enum class TraceKind : int32_t { kRound = 0, kCommit = 1, kRoom = 2, kSeen = 3, kCancel = 4, kFinish = 5, kAdmit = 6, kPreempt = 7, kAlloc = 8, kEvict = 9, kHold = 10, kRelease = 11, kPublish = 12, kDemote = 13, kMove = 14, kPlan = 15, kRows = 16, kStep = 17, kPin = 18 };
enum class PlayFault : int32_t { kNone = 0, kText = 1, kPageContent = 2, kTwoEnds = 3, kNeverEnded = 4, kRefs = 5, kFreePage = 6, kCachedPage = 7, kCounts = 8, kLists = 9, kBuckets = 10, kOrder = 11, kAborted = 12, kLeftOver = 13, kAdmission = 14, kCachedHit = 15, kStuck = 16, kSwap = 17 };

enum class Phase : int32_t {
  kMove = 0,  // pages to the swap space and back
  kEmbed = 1,  // token embedding; RoPE angles; clears the samplers' maxima
  kQkv = 2,  // norm, Q K V projections, RoPE, K and V written to their pages
  kAttend = 3,  // attention partials, one a (row, KV head, span of 256 keys)
  kOutput = 4,  // merge of the partials, O projection, residual
  kGateUp = 5,  // norm, gate and up projections, SiLU
  kDown = 6,  // down projection, residual
  kLmHead = 7,  // final norm, logits, keyed sampling as a running maximum
  kFilter = 8,  // rows with top-k, top-p, min-p or logprobs only: threshold, keyed maximum of what is kept
  kControl = 9,  // one team: verify, commit, publish, admit, draft, plan the next step
};
constexpr int kPhases = 10;
#define XL_FORWARD_PHASES(X) X(move, kMove) X(embed, kEmbed) X(qkv, kQkv) X(attend, kAttend) X(output, kOutput) X(gate_up, kGateUp) X(down, kDown) X(lm_head, kLmHead) X(filter, kFilter)
constexpr int kFirstLayerPhase = 2;
constexpr int kLastLayerPhase = 6;

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
  uint64_t deadline_ns;  // time it has from when the loop sees it; 0: for ever
  int32_t priority;  // lower goes first, under Policy.PRIORITY
  int32_t share;  // 1: it may use pages of others and leave its own to them
  int32_t pin;  // 1: the full pages of its prompt are held for good; needs `share`
};
static_assert(sizeof(Submission) == 208, "Submission");
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
static_assert(offsetof(Submission, deadline_ns) == 184, "Submission.deadline_ns");
static_assert(offsetof(Submission, priority) == 192, "Submission.priority");
static_assert(offsetof(Submission, share) == 196, "Submission.share");
static_assert(offsetof(Submission, pin) == 200, "Submission.pin");

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
  int32_t n_cached;  // ADMITTED, RESUMED: tokens whose K and V were found in shared pages
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
static_assert(offsetof(Event, n_cached) == 52, "Event.n_cached");

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
  int32_t n_waiting;  // requests that were never admitted, in the rings or with a slot
  int32_t n_preempted;  // requests that had run and wait for pages
  int32_t n_prefill;  // requests that had prefill rows in the step
  int32_t n_decode;  // requests that had a decode row in the step
  int32_t n_finished;  // requests that the step finished
  int32_t n_recomputed_rows;  // prefill rows at positions that were stored before a preemption
  int32_t n_preemptions;  // while it was planned
  int32_t n_moves;  // pages copied to the swap space or back
  int32_t n_evictions;  // cached pages that were given new owners while it was planned
  int32_t pages_total;  // conservation: free + cached + active + draft = total
  int32_t pages_free;  // while the step ran
  int32_t pages_cached;  // held by nobody, kept for their content
  int32_t pages_active;  // hold or will hold committed tokens
  int32_t pages_draft;  // hold unverified tokens only
  int32_t pages_pinned;  // part of active: held for good
  int32_t pages_locked;  // part of active without the pages that only requests with no row in the step hold
  int32_t context_tokens;  // tokens whose K and V the step had to read, once a request, its own rows included
  int64_t attended_tokens;  // tokens that its rows attend to, summed over rows
  int32_t live_tokens;  // committed tokens of running requests whose K and V are stored, after the step; shared ones once
  int32_t live_pages;  // pages that hold them, after the step; shared ones once
  uint64_t phase_ns[10];  // device time a phase took, barrier included, summed over layers
};
static_assert(sizeof(StepRecord) == 216, "StepRecord");
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
static_assert(offsetof(StepRecord, n_preempted) == 56, "StepRecord.n_preempted");
static_assert(offsetof(StepRecord, n_prefill) == 60, "StepRecord.n_prefill");
static_assert(offsetof(StepRecord, n_decode) == 64, "StepRecord.n_decode");
static_assert(offsetof(StepRecord, n_finished) == 68, "StepRecord.n_finished");
static_assert(offsetof(StepRecord, n_recomputed_rows) == 72, "StepRecord.n_recomputed_rows");
static_assert(offsetof(StepRecord, n_preemptions) == 76, "StepRecord.n_preemptions");
static_assert(offsetof(StepRecord, n_moves) == 80, "StepRecord.n_moves");
static_assert(offsetof(StepRecord, n_evictions) == 84, "StepRecord.n_evictions");
static_assert(offsetof(StepRecord, pages_total) == 88, "StepRecord.pages_total");
static_assert(offsetof(StepRecord, pages_free) == 92, "StepRecord.pages_free");
static_assert(offsetof(StepRecord, pages_cached) == 96, "StepRecord.pages_cached");
static_assert(offsetof(StepRecord, pages_active) == 100, "StepRecord.pages_active");
static_assert(offsetof(StepRecord, pages_draft) == 104, "StepRecord.pages_draft");
static_assert(offsetof(StepRecord, pages_pinned) == 108, "StepRecord.pages_pinned");
static_assert(offsetof(StepRecord, pages_locked) == 112, "StepRecord.pages_locked");
static_assert(offsetof(StepRecord, context_tokens) == 116, "StepRecord.context_tokens");
static_assert(offsetof(StepRecord, attended_tokens) == 120, "StepRecord.attended_tokens");
static_assert(offsetof(StepRecord, live_tokens) == 128, "StepRecord.live_tokens");
static_assert(offsetof(StepRecord, live_pages) == 132, "StepRecord.live_pages");
static_assert(offsetof(StepRecord, phase_ns) == 136, "StepRecord.phase_ns");

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
  int32_t n_moves;  // of Params.moves; 0: the move phase is left out
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
static_assert(offsetof(Step, n_moves) == 48, "Step.n_moves");
static_assert(offsetof(Step, leave) == 52, "Step.leave");
static_assert(offsetof(Step, n_page_patches) == 56, "Step.n_page_patches");
static_assert(offsetof(Step, n_count_patches) == 60, "Step.n_count_patches");

// The device's state of a request that runs, was preempted, or waits with its tokens here: Params.tokens[slot], prompt then output.
struct Slot {
  uint64_t request_id;
  uint64_t seed;
  int64_t rank;  // its place among requests: the smallest goes first and is preempted last
  uint64_t number;  // running index of its submission; settles equal ranks
  uint64_t deadline_ns;  // device clock at which it ends; 0: never
  uint64_t content;  // Page.content of the last of its addressable pages; 0: none
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
  int32_t n_addressable;  // its first pages, which others can find
  int32_t n_hashed;  // valid entries of Params.page_hashes[slot]
  int32_t share;  // 1: it may use pages of others and leave its own to them
  int32_t pin;  // 1: the full pages of its prompt are held for good
  int32_t n_stored;  // tokens that were stored when it was preempted last: rows below are recomputation
  int32_t n_swapped;  // entries of Params.swap_table[slot]
  int32_t swapped_tokens;  // tokens that they hold
  int32_t row_begin;  // its rows in the step
  int32_t row_count;  // 0: none in this step
  int32_t n_drafts;  // drafts among them, behind the decode row
  int32_t n_accepted;  // set by verification
  int32_t n_emitted;  // tokens that verification found: accepted drafts and one more
  int32_t drafts[16];  // proposed tokens
  int32_t emitted[16];  // token ids
};
static_assert(sizeof(Slot) == 408, "Slot");
static_assert(offsetof(Slot, request_id) == 0, "Slot.request_id");
static_assert(offsetof(Slot, seed) == 8, "Slot.seed");
static_assert(offsetof(Slot, rank) == 16, "Slot.rank");
static_assert(offsetof(Slot, number) == 24, "Slot.number");
static_assert(offsetof(Slot, deadline_ns) == 32, "Slot.deadline_ns");
static_assert(offsetof(Slot, content) == 40, "Slot.content");
static_assert(offsetof(Slot, state) == 48, "Slot.state");
static_assert(offsetof(Slot, prompt_len) == 52, "Slot.prompt_len");
static_assert(offsetof(Slot, length) == 56, "Slot.length");
static_assert(offsetof(Slot, computed) == 60, "Slot.computed");
static_assert(offsetof(Slot, max_new_tokens) == 64, "Slot.max_new_tokens");
static_assert(offsetof(Slot, ignore_eos) == 68, "Slot.ignore_eos");
static_assert(offsetof(Slot, n_stop_ids) == 72, "Slot.n_stop_ids");
static_assert(offsetof(Slot, temperature) == 76, "Slot.temperature");
static_assert(offsetof(Slot, top_k) == 80, "Slot.top_k");
static_assert(offsetof(Slot, top_p) == 84, "Slot.top_p");
static_assert(offsetof(Slot, min_p) == 88, "Slot.min_p");
static_assert(offsetof(Slot, repetition_penalty) == 92, "Slot.repetition_penalty");
static_assert(offsetof(Slot, presence_penalty) == 96, "Slot.presence_penalty");
static_assert(offsetof(Slot, frequency_penalty) == 100, "Slot.frequency_penalty");
static_assert(offsetof(Slot, n_logprobs) == 104, "Slot.n_logprobs");
static_assert(offsetof(Slot, n_bias) == 108, "Slot.n_bias");
static_assert(offsetof(Slot, n_target) == 112, "Slot.n_target");
static_assert(offsetof(Slot, target) == 116, "Slot.target");
static_assert(offsetof(Slot, adjusted) == 180, "Slot.adjusted");
static_assert(offsetof(Slot, penalized) == 184, "Slot.penalized");
static_assert(offsetof(Slot, filtered) == 188, "Slot.filtered");
static_assert(offsetof(Slot, stop_ids) == 192, "Slot.stop_ids");
static_assert(offsetof(Slot, oracle_len) == 224, "Slot.oracle_len");
static_assert(offsetof(Slot, n_pages) == 228, "Slot.n_pages");
static_assert(offsetof(Slot, n_addressable) == 232, "Slot.n_addressable");
static_assert(offsetof(Slot, n_hashed) == 236, "Slot.n_hashed");
static_assert(offsetof(Slot, share) == 240, "Slot.share");
static_assert(offsetof(Slot, pin) == 244, "Slot.pin");
static_assert(offsetof(Slot, n_stored) == 248, "Slot.n_stored");
static_assert(offsetof(Slot, n_swapped) == 252, "Slot.n_swapped");
static_assert(offsetof(Slot, swapped_tokens) == 256, "Slot.swapped_tokens");
static_assert(offsetof(Slot, row_begin) == 260, "Slot.row_begin");
static_assert(offsetof(Slot, row_count) == 264, "Slot.row_count");
static_assert(offsetof(Slot, n_drafts) == 268, "Slot.n_drafts");
static_assert(offsetof(Slot, n_accepted) == 272, "Slot.n_accepted");
static_assert(offsetof(Slot, n_emitted) == 276, "Slot.n_emitted");
static_assert(offsetof(Slot, drafts) == 280, "Slot.drafts");
static_assert(offsetof(Slot, emitted) == 344, "Slot.emitted");

// What the planner knows of a KV page: FREE (on the stack) -> ACTIVE (refs > 0) -> CACHED (refs 0, addressable).
struct Page {
  uint64_t hash;  // of its tokens and of all before them
  uint64_t content;  // number of that sequence of tokens, of no other one; 0: not addressable
  uint64_t parent;  // content of the page before it; 0: it is the first
  int32_t refs;  // page tables that hold it
  int32_t bucket_next;  // next page with its bucket; -1: none
  int32_t older;  // neighbour on its eviction list; -1: none
  int32_t newer;  // likewise
  int32_t list;  // eviction list; -1: on none
  int32_t hits;  // times it was found
  int32_t pinned;  // 1: one of its references is a pin, which stays
};
static_assert(sizeof(Page) == 56, "Page");
static_assert(offsetof(Page, hash) == 0, "Page.hash");
static_assert(offsetof(Page, content) == 8, "Page.content");
static_assert(offsetof(Page, parent) == 16, "Page.parent");
static_assert(offsetof(Page, refs) == 24, "Page.refs");
static_assert(offsetof(Page, bucket_next) == 28, "Page.bucket_next");
static_assert(offsetof(Page, older) == 32, "Page.older");
static_assert(offsetof(Page, newer) == 36, "Page.newer");
static_assert(offsetof(Page, list) == 40, "Page.list");
static_assert(offsetof(Page, hits) == 44, "Page.hits");
static_assert(offsetof(Page, pinned) == 48, "Page.pinned");

// A request that waits to be admitted or resumed, in a binary heap by (rank, number).
struct QueueEntry {
  int64_t rank;  // as Slot.rank
  uint64_t number;  // as Slot.number; its submission lies there in Params.queue
  int32_t slot;  // that holds its tokens; -1: they are in the prompt ring
};
static_assert(sizeof(QueueEntry) == 24, "QueueEntry");
static_assert(offsetof(QueueEntry, rank) == 0, "QueueEntry.rank");
static_assert(offsetof(QueueEntry, number) == 8, "QueueEntry.number");
static_assert(offsetof(QueueEntry, slot) == 16, "QueueEntry.slot");

// A page to copy between the pool and the swap space.
struct Move {
  int32_t page;
  int32_t swap_page;
  int32_t slot;  // whose it is
  int32_t out;  // 1: to the swap space; 0: back
};
static_assert(sizeof(Move) == 16, "Move");
static_assert(offsetof(Move, page) == 0, "Move.page");
static_assert(offsetof(Move, swap_page) == 4, "Move.swap_page");
static_assert(offsetof(Move, slot) == 8, "Move.slot");
static_assert(offsetof(Move, out) == 12, "Move.out");

// A decision of the control plane; what the fields say depends on its TraceKind.
struct TraceEntry {
  uint64_t round;  // of control, from 0
  uint64_t value;
  int32_t kind;  // TraceKind
  int32_t a;
  int32_t b;
  int32_t c;
};
static_assert(sizeof(TraceEntry) == 32, "TraceEntry");
static_assert(offsetof(TraceEntry, round) == 0, "TraceEntry.round");
static_assert(offsetof(TraceEntry, value) == 8, "TraceEntry.value");
static_assert(offsetof(TraceEntry, kind) == 16, "TraceEntry.kind");
static_assert(offsetof(TraceEntry, a) == 20, "TraceEntry.a");
static_assert(offsetof(TraceEntry, b) == 24, "TraceEntry.b");
static_assert(offsetof(TraceEntry, c) == 28, "TraceEntry.c");

// What a step costs on a virtual clock, in nanoseconds; xlpk/costs.py has the formula.
struct StepCosts {
  double fixed_ns;  // a step
  double row_ns[12];  // all rows, at 1, 2, 4, ... rows
  double sample_ns[12];  // all sampled rows, likewise
  double filter_ns[12];  // all rows that the filter phase takes, likewise
  double context_ns;  // a token of context_tokens
  double attended_ns;  // a token of attended_tokens
  double move_ns;  // a page that is moved
  double control_ns;  // control, a step
  double control_row_ns;  // control, a row
  double publish_ns;  // from the end of a step until the host sees its tokens
  double submit_ns;  // from submission until the loop sees it
};
static_assert(sizeof(StepCosts) == 352, "StepCosts");
static_assert(offsetof(StepCosts, fixed_ns) == 0, "StepCosts.fixed_ns");
static_assert(offsetof(StepCosts, row_ns) == 8, "StepCosts.row_ns");
static_assert(offsetof(StepCosts, sample_ns) == 104, "StepCosts.sample_ns");
static_assert(offsetof(StepCosts, filter_ns) == 200, "StepCosts.filter_ns");
static_assert(offsetof(StepCosts, context_ns) == 296, "StepCosts.context_ns");
static_assert(offsetof(StepCosts, attended_ns) == 304, "StepCosts.attended_ns");
static_assert(offsetof(StepCosts, move_ns) == 312, "StepCosts.move_ns");
static_assert(offsetof(StepCosts, control_ns) == 320, "StepCosts.control_ns");
static_assert(offsetof(StepCosts, control_row_ns) == 328, "StepCosts.control_row_ns");
static_assert(offsetof(StepCosts, publish_ns) == 336, "StepCosts.publish_ns");
static_assert(offsetof(StepCosts, submit_ns) == 344, "StepCosts.submit_ns");

// Scalars of the control plane; only the controlling team touches them.
struct LoopState {
  uint64_t n_steps;  // steps planned so far
  uint64_t prompt_head;  // prompt ring: first token that is still needed
  uint64_t submit_head;  // oldest submission whose place in the ring is still needed
  uint64_t submit_seen;  // next submission to look at
  uint64_t submit_tail;  // submissions written, as this round of control saw it
  uint64_t cancel_head;  // next cancellation to look at
  uint64_t event_tail;  // events written, published at the end of control
  uint64_t step_tail;  // step records written
  uint64_t trace_tail;  // entries of the decision trace written
  uint64_t trace_limit;  // where they have to stop in this round: the host has not taken the older ones
  uint64_t trace_lost;  // entries for which there was no room
  uint64_t next_deadline_ns;  // no request ends before by its deadline; 0: none has one
  uint64_t n_contents;  // contents that pages have had
  int32_t n_free_pages;  // entries of Params.free_pages; set by the host to all
  int32_t n_cached_pages;  // addressable pages that nobody holds
  int32_t n_active_pages;  // pages that somebody holds
  int32_t n_refs;  // sum of Page.refs
  int32_t n_pinned_pages;  // pages that are held for good
  int32_t oldest[2];  // of an eviction list: next to go; -1: empty
  int32_t newest[2];
  int32_t n_listed[2];  // pages on an eviction list
  int32_t n_order;  // running requests: entries of Params.order, by rank
  int32_t n_queued;  // entries of Params.heap
  int32_t n_preempted;  // slots in the state PREEMPTED
  int32_t n_free_slots;  // entries of Params.free_slots; set by the host to all
  int32_t n_free_swap;  // entries of Params.swap_free; set by the host to all
  int32_t n_moves;  // of Params.moves, for the next step
  int32_t n_preemptions;  // since the last record
  int32_t n_evictions;  // since the last record
  int32_t filled_slot;  // slot that the team fills; -1: none
  int32_t draft_rows;  // rows that drafts of the next step may take; -1: no step can be planned now
  uint64_t phase_ticks[10];  // of the step in flight, by clock_ticks of who ran the phase
  uint64_t span_ns;  // global time in which the forward phases' clock counted span_ticks
  uint64_t span_ticks;  // 0: their ticks are nanoseconds
  uint64_t n_launches;  // launches of the persistent loop
  uint64_t n_check_ins;  // that the planner team owes
  uint64_t launched_ns;  // device clock when all teams of this launch were there
  uint64_t busy_ns;  // device clock when there was work last
  uint64_t beat;  // the host's heartbeat as it was seen last
  uint64_t beat_ns;  // device clock when it changed
  uint64_t n_rounds;  // rounds of control
  uint64_t round_ns;  // device clock at the start of the last of them
  uint64_t n_left;  // launches that ended
  uint64_t pong;  // ping that was answered last
};
static_assert(sizeof(LoopState) == 368, "LoopState");
static_assert(offsetof(LoopState, n_steps) == 0, "LoopState.n_steps");
static_assert(offsetof(LoopState, prompt_head) == 8, "LoopState.prompt_head");
static_assert(offsetof(LoopState, submit_head) == 16, "LoopState.submit_head");
static_assert(offsetof(LoopState, submit_seen) == 24, "LoopState.submit_seen");
static_assert(offsetof(LoopState, submit_tail) == 32, "LoopState.submit_tail");
static_assert(offsetof(LoopState, cancel_head) == 40, "LoopState.cancel_head");
static_assert(offsetof(LoopState, event_tail) == 48, "LoopState.event_tail");
static_assert(offsetof(LoopState, step_tail) == 56, "LoopState.step_tail");
static_assert(offsetof(LoopState, trace_tail) == 64, "LoopState.trace_tail");
static_assert(offsetof(LoopState, trace_limit) == 72, "LoopState.trace_limit");
static_assert(offsetof(LoopState, trace_lost) == 80, "LoopState.trace_lost");
static_assert(offsetof(LoopState, next_deadline_ns) == 88, "LoopState.next_deadline_ns");
static_assert(offsetof(LoopState, n_contents) == 96, "LoopState.n_contents");
static_assert(offsetof(LoopState, n_free_pages) == 104, "LoopState.n_free_pages");
static_assert(offsetof(LoopState, n_cached_pages) == 108, "LoopState.n_cached_pages");
static_assert(offsetof(LoopState, n_active_pages) == 112, "LoopState.n_active_pages");
static_assert(offsetof(LoopState, n_refs) == 116, "LoopState.n_refs");
static_assert(offsetof(LoopState, n_pinned_pages) == 120, "LoopState.n_pinned_pages");
static_assert(offsetof(LoopState, oldest) == 124, "LoopState.oldest");
static_assert(offsetof(LoopState, newest) == 132, "LoopState.newest");
static_assert(offsetof(LoopState, n_listed) == 140, "LoopState.n_listed");
static_assert(offsetof(LoopState, n_order) == 148, "LoopState.n_order");
static_assert(offsetof(LoopState, n_queued) == 152, "LoopState.n_queued");
static_assert(offsetof(LoopState, n_preempted) == 156, "LoopState.n_preempted");
static_assert(offsetof(LoopState, n_free_slots) == 160, "LoopState.n_free_slots");
static_assert(offsetof(LoopState, n_free_swap) == 164, "LoopState.n_free_swap");
static_assert(offsetof(LoopState, n_moves) == 168, "LoopState.n_moves");
static_assert(offsetof(LoopState, n_preemptions) == 172, "LoopState.n_preemptions");
static_assert(offsetof(LoopState, n_evictions) == 176, "LoopState.n_evictions");
static_assert(offsetof(LoopState, filled_slot) == 180, "LoopState.filled_slot");
static_assert(offsetof(LoopState, draft_rows) == 184, "LoopState.draft_rows");
static_assert(offsetof(LoopState, phase_ticks) == 192, "LoopState.phase_ticks");
static_assert(offsetof(LoopState, span_ns) == 272, "LoopState.span_ns");
static_assert(offsetof(LoopState, span_ticks) == 280, "LoopState.span_ticks");
static_assert(offsetof(LoopState, n_launches) == 288, "LoopState.n_launches");
static_assert(offsetof(LoopState, n_check_ins) == 296, "LoopState.n_check_ins");
static_assert(offsetof(LoopState, launched_ns) == 304, "LoopState.launched_ns");
static_assert(offsetof(LoopState, busy_ns) == 312, "LoopState.busy_ns");
static_assert(offsetof(LoopState, beat) == 320, "LoopState.beat");
static_assert(offsetof(LoopState, beat_ns) == 328, "LoopState.beat_ns");
static_assert(offsetof(LoopState, n_rounds) == 336, "LoopState.n_rounds");
static_assert(offsetof(LoopState, round_ns) == 344, "LoopState.round_ns");
static_assert(offsetof(LoopState, n_left) == 352, "LoopState.n_left");
static_assert(offsetof(LoopState, pong) == 360, "LoopState.pong");

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

// When a team ran its share of a phase, in its ring of phase spans.
struct SpanEntry {
  uint64_t begin_ns;  // device clock, behind the barrier in front of the phase
  uint64_t end_ns;  // its share is done; it goes to the barrier behind the phase
  uint32_t step;  // lowest bits of its number; control: of the step that it plans, else of the one it commits
  uint16_t phase;  // Phase
  uint16_t layer;
};
static_assert(sizeof(SpanEntry) == 24, "SpanEntry");
static_assert(offsetof(SpanEntry, begin_ns) == 0, "SpanEntry.begin_ns");
static_assert(offsetof(SpanEntry, end_ns) == 8, "SpanEntry.end_ns");
static_assert(offsetof(SpanEntry, step) == 16, "SpanEntry.step");
static_assert(offsetof(SpanEntry, phase) == 20, "SpanEntry.phase");
static_assert(offsetof(SpanEntry, layer) == 22, "SpanEntry.layer");

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
  uint64_t trace_head;  // host: entries of the decision trace taken; read only where there is one
  uint8_t host_pad[48];
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
  uint32_t running;  // device: requests that it has seen and not ended
  uint64_t trace_tail;  // device: entries of the decision trace written
  uint64_t trace_lost;  // device: those for which there was no room
  uint8_t device_pad[24];
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
static_assert(offsetof(Mailbox, trace_head) == 72, "Mailbox.trace_head");
static_assert(offsetof(Mailbox, host_pad) == 80, "Mailbox.host_pad");
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
static_assert(offsetof(Mailbox, trace_tail) == 216, "Mailbox.trace_tail");
static_assert(offsetof(Mailbox, trace_lost) == 224, "Mailbox.trace_lost");
static_assert(offsetof(Mailbox, device_pad) == 232, "Mailbox.device_pad");

// Words that teams share with each other only.
struct GridState {
  uint64_t arrivals;  // at the grid barrier since the start; never reset
  uint8_t arrivals_pad[120];
  uint32_t abort;  // AbortReason; the first one written stays
  uint8_t abort_pad[124];
  uint64_t check_ins;  // of the planner team since the start: one a launch, one a round of control; never reset
  uint8_t check_ins_pad[120];
};
static_assert(sizeof(GridState) == 384, "GridState");
static_assert(offsetof(GridState, arrivals) == 0, "GridState.arrivals");
static_assert(offsetof(GridState, arrivals_pad) == 8, "GridState.arrivals_pad");
static_assert(offsetof(GridState, abort) == 128, "GridState.abort");
static_assert(offsetof(GridState, abort_pad) == 132, "GridState.abort_pad");
static_assert(offsetof(GridState, check_ins) == 256, "GridState.check_ins");
static_assert(offsetof(GridState, check_ins_pad) == 264, "GridState.check_ins_pad");

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
  Submission* queue;  // the device's copy of what it has seen, [submission_capacity]
  uint8_t* gone;  // 1: nothing of the submission in the rings is needed any more; [submission_capacity]
  QueueEntry* heap;  // requests that wait, [submission_capacity + max_slots]
  Event* events;  // [event_capacity]
  Logprobs* logprobs;  // beside `events`, of TOKEN events whose request asks for them; [event_capacity]
  StepRecord* step_records;  // [step_capacity]
  LoopState* state;
  Step* step;
  StepRecord* record;  // of the step in flight
  Row* rows;  // [max_rows]
  int32_t* sample_rows;  // row of each sampled row, [max_rows]
  Slot* slots;  // [max_slots]
  int32_t* order;  // running slots by rank, [max_running]
  int32_t* tokens;  // [max_slots, max_len]
  int32_t* oracle;  // right output tokens, [max_slots, max_len]
  int32_t* page_table;  // [max_slots, max_slot_pages]
  int32_t* free_slots;  // a stack, [max_slots]
  uint64_t* page_hashes;  // Page.hash of a slot's full pages, [max_slots, max_slot_pages]
  int32_t* free_pages;  // a stack, [n_pages]
  Page* pages;  // [n_pages]
  int32_t* page_tokens;  // tokens of addressable pages, [n_pages, page_size]
  void* swap;  // in the host's memory, [n_swap_pages, layers, 2, num_key_value_heads, page_size, head_stride]
  int32_t* swap_free;  // a stack, [n_swap_pages]
  int32_t* swap_table;  // [max_slots, max_slot_pages]; null: there is no swap space
  Move* moves;  // [n_pages + n_swap_pages]; null: likewise
  int32_t* buckets;  // first page of a bucket, -1: none; [n_buckets]
  TraceEntry* trace;  // null, or the decision trace, [trace_capacity]
  SpanEntry* spans;  // null, or phase spans, [1 + teams, span_capacity]: of control, then of each team; rings that overwrite their oldest
  uint64_t* span_counts;  // spans that a ring was given, each on a line of its own, [1 + teams, kLine / 8]
  FlightEntry* flight;  // null, or the flight recorder, [teams, kFlightEntries]
  Patch* patches;  // launched from the host: changes of the page table, then of the counts
  uint64_t spin_deadline_ns;  // a wait that lasts longer aborts the loop
  uint64_t census_ns;  // the first wait of a launch: all teams must have started
  uint64_t lease_ns;  // a launch leaves after this long with its state kept; 0: never
  uint64_t idle_ns;  // a launch leaves after this long without work; 0: never
  uint64_t heartbeat_ns;  // a launch leaves when the host's heartbeat stood still for this long; 0: never
  int32_t version;  // kLayoutVersion
  int32_t max_rows;  // rows of a step at most
  int32_t planner;  // 1: the last team plans beside the steps and has no share of them; 0: there is none
  int32_t max_running;  // requests that run at once
  int32_t max_slots;  // requests that run or wait with their tokens on the device
  int32_t max_len;  // tokens of a sequence at most
  int32_t max_spans;  // ceil(max_len / kAttentionSpan)
  int32_t max_slot_pages;  // ceil(max_len / page_size)
  int32_t n_pages;
  int32_t n_buckets;  // power of two
  int32_t n_swap_pages;  // 0: preempted requests are computed again
  int32_t n_eos_ids;
  int32_t scratch_floats;  // floats of scratch a team has
  int32_t submission_capacity;  // power of two
  int32_t prompt_capacity;  // power of two, tokens
  int32_t event_capacity;  // power of two
  int32_t step_capacity;  // power of two
  int32_t trace_capacity;  // power of two
  int32_t span_capacity;  // power of two
  int32_t prefill_chunk;  // prompt tokens of one request in one step at most
  int32_t block;  // most tokens a verification may emit: drafts + 1
  int32_t policy;  // Policy
  int32_t ageing_steps;  // steps of waiting that are worth one level of priority
  int32_t eviction;  // Eviction
  int32_t prefix_sharing;  // 1: pages are addressable by their content
  int32_t proposer;  // Proposer
  int32_t acceptance;  // Acceptance
  int32_t ngram_min;  // shortest suffix that is looked up
  int32_t ngram_max;  // longest suffix that is looked up
  int32_t mismatch_stride;  // oracle: output positions p with (p + 1) % stride == 0 get a wrong draft; 0: never
  int32_t forced_stride;  // forced acceptance rejects drafts at output positions p with (p + 1) % stride == 0
};
static_assert(sizeof(Params) == 632, "Params");
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
static_assert(offsetof(Params, queue) == 216, "Params.queue");
static_assert(offsetof(Params, gone) == 224, "Params.gone");
static_assert(offsetof(Params, heap) == 232, "Params.heap");
static_assert(offsetof(Params, events) == 240, "Params.events");
static_assert(offsetof(Params, logprobs) == 248, "Params.logprobs");
static_assert(offsetof(Params, step_records) == 256, "Params.step_records");
static_assert(offsetof(Params, state) == 264, "Params.state");
static_assert(offsetof(Params, step) == 272, "Params.step");
static_assert(offsetof(Params, record) == 280, "Params.record");
static_assert(offsetof(Params, rows) == 288, "Params.rows");
static_assert(offsetof(Params, sample_rows) == 296, "Params.sample_rows");
static_assert(offsetof(Params, slots) == 304, "Params.slots");
static_assert(offsetof(Params, order) == 312, "Params.order");
static_assert(offsetof(Params, tokens) == 320, "Params.tokens");
static_assert(offsetof(Params, oracle) == 328, "Params.oracle");
static_assert(offsetof(Params, page_table) == 336, "Params.page_table");
static_assert(offsetof(Params, free_slots) == 344, "Params.free_slots");
static_assert(offsetof(Params, page_hashes) == 352, "Params.page_hashes");
static_assert(offsetof(Params, free_pages) == 360, "Params.free_pages");
static_assert(offsetof(Params, pages) == 368, "Params.pages");
static_assert(offsetof(Params, page_tokens) == 376, "Params.page_tokens");
static_assert(offsetof(Params, swap) == 384, "Params.swap");
static_assert(offsetof(Params, swap_free) == 392, "Params.swap_free");
static_assert(offsetof(Params, swap_table) == 400, "Params.swap_table");
static_assert(offsetof(Params, moves) == 408, "Params.moves");
static_assert(offsetof(Params, buckets) == 416, "Params.buckets");
static_assert(offsetof(Params, trace) == 424, "Params.trace");
static_assert(offsetof(Params, spans) == 432, "Params.spans");
static_assert(offsetof(Params, span_counts) == 440, "Params.span_counts");
static_assert(offsetof(Params, flight) == 448, "Params.flight");
static_assert(offsetof(Params, patches) == 456, "Params.patches");
static_assert(offsetof(Params, spin_deadline_ns) == 464, "Params.spin_deadline_ns");
static_assert(offsetof(Params, census_ns) == 472, "Params.census_ns");
static_assert(offsetof(Params, lease_ns) == 480, "Params.lease_ns");
static_assert(offsetof(Params, idle_ns) == 488, "Params.idle_ns");
static_assert(offsetof(Params, heartbeat_ns) == 496, "Params.heartbeat_ns");
static_assert(offsetof(Params, version) == 504, "Params.version");
static_assert(offsetof(Params, max_rows) == 508, "Params.max_rows");
static_assert(offsetof(Params, planner) == 512, "Params.planner");
static_assert(offsetof(Params, max_running) == 516, "Params.max_running");
static_assert(offsetof(Params, max_slots) == 520, "Params.max_slots");
static_assert(offsetof(Params, max_len) == 524, "Params.max_len");
static_assert(offsetof(Params, max_spans) == 528, "Params.max_spans");
static_assert(offsetof(Params, max_slot_pages) == 532, "Params.max_slot_pages");
static_assert(offsetof(Params, n_pages) == 536, "Params.n_pages");
static_assert(offsetof(Params, n_buckets) == 540, "Params.n_buckets");
static_assert(offsetof(Params, n_swap_pages) == 544, "Params.n_swap_pages");
static_assert(offsetof(Params, n_eos_ids) == 548, "Params.n_eos_ids");
static_assert(offsetof(Params, scratch_floats) == 552, "Params.scratch_floats");
static_assert(offsetof(Params, submission_capacity) == 556, "Params.submission_capacity");
static_assert(offsetof(Params, prompt_capacity) == 560, "Params.prompt_capacity");
static_assert(offsetof(Params, event_capacity) == 564, "Params.event_capacity");
static_assert(offsetof(Params, step_capacity) == 568, "Params.step_capacity");
static_assert(offsetof(Params, trace_capacity) == 572, "Params.trace_capacity");
static_assert(offsetof(Params, span_capacity) == 576, "Params.span_capacity");
static_assert(offsetof(Params, prefill_chunk) == 580, "Params.prefill_chunk");
static_assert(offsetof(Params, block) == 584, "Params.block");
static_assert(offsetof(Params, policy) == 588, "Params.policy");
static_assert(offsetof(Params, ageing_steps) == 592, "Params.ageing_steps");
static_assert(offsetof(Params, eviction) == 596, "Params.eviction");
static_assert(offsetof(Params, prefix_sharing) == 600, "Params.prefix_sharing");
static_assert(offsetof(Params, proposer) == 604, "Params.proposer");
static_assert(offsetof(Params, acceptance) == 608, "Params.acceptance");
static_assert(offsetof(Params, ngram_min) == 612, "Params.ngram_min");
static_assert(offsetof(Params, ngram_max) == 616, "Params.ngram_max");
static_assert(offsetof(Params, mismatch_stride) == 620, "Params.mismatch_stride");
static_assert(offsetof(Params, forced_stride) == 624, "Params.forced_stride");

// A request of a play, in the order of submission, for who plays its trace again.
struct PlayRequest {
  uint64_t request_id;
  uint64_t seed;
  uint64_t deadline_ns;  // as submitted; 0: none
  int32_t prompt_len;  // tokens
  int32_t max_new_tokens;
  int32_t priority;
  int32_t share;
  int32_t pin;
  int32_t n_output;  // tokens that it put out
  int32_t n_answers;  // right answers that came with it, the first of what it puts out
};
static_assert(sizeof(PlayRequest) == 56, "PlayRequest");
static_assert(offsetof(PlayRequest, request_id) == 0, "PlayRequest.request_id");
static_assert(offsetof(PlayRequest, seed) == 8, "PlayRequest.seed");
static_assert(offsetof(PlayRequest, deadline_ns) == 16, "PlayRequest.deadline_ns");
static_assert(offsetof(PlayRequest, prompt_len) == 24, "PlayRequest.prompt_len");
static_assert(offsetof(PlayRequest, max_new_tokens) == 28, "PlayRequest.max_new_tokens");
static_assert(offsetof(PlayRequest, priority) == 32, "PlayRequest.priority");
static_assert(offsetof(PlayRequest, share) == 36, "PlayRequest.share");
static_assert(offsetof(PlayRequest, pin) == 40, "PlayRequest.pin");
static_assert(offsetof(PlayRequest, n_output) == 44, "PlayRequest.n_output");
static_assert(offsetof(PlayRequest, n_answers) == 48, "PlayRequest.n_answers");

// What kernels/play.cpp plays with the control plane alone; all of it drawn from `seed`.
struct PlayRules {
  uint64_t seed;
  uint64_t max_requests;
  uint64_t max_events;  // events after which it ends
  int32_t mean_prompt;  // tokens, geometric
  int32_t mean_output;  // likewise
  int32_t prefixes;  // half of the prompts begin with one of these
  int32_t prefix_tokens;
  int32_t arrivals_per_step;
  int32_t cancel_one_in;  // steps between cancellations; 0: none, here and below
  int32_t deadline_one_in;  // requests to one with a deadline
  int32_t private_one_in;  // requests to one that shares nothing
  int32_t away_one_in;  // rounds to one in which the host does not look at the rings
  int32_t priorities;  // levels, uniform
  int32_t pins;  // the first so many requests are pinned
  int32_t arrivals_beside;  // requests that arrive while a step runs
  int32_t prepares;  // 1: they are taken beside it, and waiting ones prepared; 0: control does all
  int32_t recount_every;  // events between full recounts; 0: none, and texts are not checked either
  PlayRequest* requests;  // null, or what was submitted, [max_requests]
  int32_t* texts;  // with it, prompt and output of each, [max_requests, Params.max_len]
};
static_assert(sizeof(PlayRules) == 96, "PlayRules");
static_assert(offsetof(PlayRules, seed) == 0, "PlayRules.seed");
static_assert(offsetof(PlayRules, max_requests) == 8, "PlayRules.max_requests");
static_assert(offsetof(PlayRules, max_events) == 16, "PlayRules.max_events");
static_assert(offsetof(PlayRules, mean_prompt) == 24, "PlayRules.mean_prompt");
static_assert(offsetof(PlayRules, mean_output) == 28, "PlayRules.mean_output");
static_assert(offsetof(PlayRules, prefixes) == 32, "PlayRules.prefixes");
static_assert(offsetof(PlayRules, prefix_tokens) == 36, "PlayRules.prefix_tokens");
static_assert(offsetof(PlayRules, arrivals_per_step) == 40, "PlayRules.arrivals_per_step");
static_assert(offsetof(PlayRules, cancel_one_in) == 44, "PlayRules.cancel_one_in");
static_assert(offsetof(PlayRules, deadline_one_in) == 48, "PlayRules.deadline_one_in");
static_assert(offsetof(PlayRules, private_one_in) == 52, "PlayRules.private_one_in");
static_assert(offsetof(PlayRules, away_one_in) == 56, "PlayRules.away_one_in");
static_assert(offsetof(PlayRules, priorities) == 60, "PlayRules.priorities");
static_assert(offsetof(PlayRules, pins) == 64, "PlayRules.pins");
static_assert(offsetof(PlayRules, arrivals_beside) == 68, "PlayRules.arrivals_beside");
static_assert(offsetof(PlayRules, prepares) == 72, "PlayRules.prepares");
static_assert(offsetof(PlayRules, recount_every) == 76, "PlayRules.recount_every");
static_assert(offsetof(PlayRules, requests) == 80, "PlayRules.requests");
static_assert(offsetof(PlayRules, texts) == 88, "PlayRules.texts");

// What came of it.
struct PlayResult {
  uint64_t events;
  uint64_t steps;
  uint64_t rows;
  uint64_t requests;  // submitted
  uint64_t finished;  // by length
  uint64_t cancelled;
  uint64_t late;  // ended by a deadline
  uint64_t preemptions;
  uint64_t evictions;
  uint64_t recomputed_rows;
  uint64_t moves;  // pages copied
  uint64_t prompt_tokens;
  uint64_t cached_tokens;  // of them, found in shared pages
  uint64_t drafts;  // verified
  uint64_t accepted;
  uint64_t control_ns;  // time in control
  int32_t fault;  // PlayFault; 0: every check held
  int32_t detail;
};
static_assert(sizeof(PlayResult) == 136, "PlayResult");
static_assert(offsetof(PlayResult, events) == 0, "PlayResult.events");
static_assert(offsetof(PlayResult, steps) == 8, "PlayResult.steps");
static_assert(offsetof(PlayResult, rows) == 16, "PlayResult.rows");
static_assert(offsetof(PlayResult, requests) == 24, "PlayResult.requests");
static_assert(offsetof(PlayResult, finished) == 32, "PlayResult.finished");
static_assert(offsetof(PlayResult, cancelled) == 40, "PlayResult.cancelled");
static_assert(offsetof(PlayResult, late) == 48, "PlayResult.late");
static_assert(offsetof(PlayResult, preemptions) == 56, "PlayResult.preemptions");
static_assert(offsetof(PlayResult, evictions) == 64, "PlayResult.evictions");
static_assert(offsetof(PlayResult, recomputed_rows) == 72, "PlayResult.recomputed_rows");
static_assert(offsetof(PlayResult, moves) == 80, "PlayResult.moves");
static_assert(offsetof(PlayResult, prompt_tokens) == 88, "PlayResult.prompt_tokens");
static_assert(offsetof(PlayResult, cached_tokens) == 96, "PlayResult.cached_tokens");
static_assert(offsetof(PlayResult, drafts) == 104, "PlayResult.drafts");
static_assert(offsetof(PlayResult, accepted) == 112, "PlayResult.accepted");
static_assert(offsetof(PlayResult, control_ns) == 120, "PlayResult.control_ns");
static_assert(offsetof(PlayResult, fault) == 128, "PlayResult.fault");
static_assert(offsetof(PlayResult, detail) == 132, "PlayResult.detail");

// A request of kernels/simulate.cpp; they come by arrival.
struct SimulatedRequest {
  uint64_t arrival_ns;  // virtual time at which the host submits it
  uint64_t deadline_ns;  // after its arrival; 0: none
  uint64_t tokens_begin;  // its prompt in SimulateRules.tokens, if there are any
  uint64_t blocks_begin;  // its first entry in SimulateRules.blocks
  int32_t n_blocks;  // blocks of the prompt, from its beginning, that others may share; the rest is its own
  int32_t prompt_len;  // tokens
  int32_t max_new_tokens;  // it puts out as many
  int32_t priority;
  int32_t share;  // 1: it may use pages of others and leave its own to them
  int32_t filtered;  // 1: its sampled rows take the filter phase
};
static_assert(sizeof(SimulatedRequest) == 56, "SimulatedRequest");
static_assert(offsetof(SimulatedRequest, arrival_ns) == 0, "SimulatedRequest.arrival_ns");
static_assert(offsetof(SimulatedRequest, deadline_ns) == 8, "SimulatedRequest.deadline_ns");
static_assert(offsetof(SimulatedRequest, tokens_begin) == 16, "SimulatedRequest.tokens_begin");
static_assert(offsetof(SimulatedRequest, blocks_begin) == 24, "SimulatedRequest.blocks_begin");
static_assert(offsetof(SimulatedRequest, n_blocks) == 32, "SimulatedRequest.n_blocks");
static_assert(offsetof(SimulatedRequest, prompt_len) == 36, "SimulatedRequest.prompt_len");
static_assert(offsetof(SimulatedRequest, max_new_tokens) == 40, "SimulatedRequest.max_new_tokens");
static_assert(offsetof(SimulatedRequest, priority) == 44, "SimulatedRequest.priority");
static_assert(offsetof(SimulatedRequest, share) == 48, "SimulatedRequest.share");
static_assert(offsetof(SimulatedRequest, filtered) == 52, "SimulatedRequest.filtered");

// What became of a request; times are of the loop's clock, -1: it never came so far.
struct SimulatedOutcome {
  int64_t seen_ns;  // the loop took it from the ring
  int64_t admitted_ns;  // first admission
  int64_t first_token_ns;  // commit of its first token; the host sees it publish_ns later, likewise below
  int64_t last_token_ns;
  int64_t finished_ns;
  int32_t instance;  // that served it
  int32_t reason;  // FinishReason
  int32_t n_output;  // tokens
  int32_t n_cached;  // prompt tokens found at its first admission
  int32_t n_preemptions;
  int32_t n_drafts;  // verified
  int32_t n_accepted;  // of them
};
static_assert(sizeof(SimulatedOutcome) == 72, "SimulatedOutcome");
static_assert(offsetof(SimulatedOutcome, seen_ns) == 0, "SimulatedOutcome.seen_ns");
static_assert(offsetof(SimulatedOutcome, admitted_ns) == 8, "SimulatedOutcome.admitted_ns");
static_assert(offsetof(SimulatedOutcome, first_token_ns) == 16, "SimulatedOutcome.first_token_ns");
static_assert(offsetof(SimulatedOutcome, last_token_ns) == 24, "SimulatedOutcome.last_token_ns");
static_assert(offsetof(SimulatedOutcome, finished_ns) == 32, "SimulatedOutcome.finished_ns");
static_assert(offsetof(SimulatedOutcome, instance) == 40, "SimulatedOutcome.instance");
static_assert(offsetof(SimulatedOutcome, reason) == 44, "SimulatedOutcome.reason");
static_assert(offsetof(SimulatedOutcome, n_output) == 48, "SimulatedOutcome.n_output");
static_assert(offsetof(SimulatedOutcome, n_cached) == 52, "SimulatedOutcome.n_cached");
static_assert(offsetof(SimulatedOutcome, n_preemptions) == 56, "SimulatedOutcome.n_preemptions");
static_assert(offsetof(SimulatedOutcome, n_drafts) == 60, "SimulatedOutcome.n_drafts");
static_assert(offsetof(SimulatedOutcome, n_accepted) == 64, "SimulatedOutcome.n_accepted");

// What an instance of a simulated fleet did.
struct SimulatedTotals {
  uint64_t requests;  // routed to it
  uint64_t finished;  // ended, in whatever way
  uint64_t steps;
  uint64_t rows;
  uint64_t sample_rows;
  uint64_t tokens;  // put out
  uint64_t prompt_tokens;  // of requests that were admitted
  uint64_t cached_tokens;  // of them, found in shared pages at the first admission
  uint64_t recomputed_rows;
  uint64_t evictions;
  uint64_t preemptions;
  uint64_t moves;  // pages to the swap space and back
  uint64_t drafts;  // verified
  uint64_t accepted;
  uint64_t busy_ns;  // a step was in flight
  uint64_t idle_ns;  // until the fleet's last event
  uint64_t present_ns;  // integral over time of the requests that it had seen and not ended
  uint64_t waiting_ns;  // of them, those that were never admitted
};
static_assert(sizeof(SimulatedTotals) == 144, "SimulatedTotals");
static_assert(offsetof(SimulatedTotals, requests) == 0, "SimulatedTotals.requests");
static_assert(offsetof(SimulatedTotals, finished) == 8, "SimulatedTotals.finished");
static_assert(offsetof(SimulatedTotals, steps) == 16, "SimulatedTotals.steps");
static_assert(offsetof(SimulatedTotals, rows) == 24, "SimulatedTotals.rows");
static_assert(offsetof(SimulatedTotals, sample_rows) == 32, "SimulatedTotals.sample_rows");
static_assert(offsetof(SimulatedTotals, tokens) == 40, "SimulatedTotals.tokens");
static_assert(offsetof(SimulatedTotals, prompt_tokens) == 48, "SimulatedTotals.prompt_tokens");
static_assert(offsetof(SimulatedTotals, cached_tokens) == 56, "SimulatedTotals.cached_tokens");
static_assert(offsetof(SimulatedTotals, recomputed_rows) == 64, "SimulatedTotals.recomputed_rows");
static_assert(offsetof(SimulatedTotals, evictions) == 72, "SimulatedTotals.evictions");
static_assert(offsetof(SimulatedTotals, preemptions) == 80, "SimulatedTotals.preemptions");
static_assert(offsetof(SimulatedTotals, moves) == 88, "SimulatedTotals.moves");
static_assert(offsetof(SimulatedTotals, drafts) == 96, "SimulatedTotals.drafts");
static_assert(offsetof(SimulatedTotals, accepted) == 104, "SimulatedTotals.accepted");
static_assert(offsetof(SimulatedTotals, busy_ns) == 112, "SimulatedTotals.busy_ns");
static_assert(offsetof(SimulatedTotals, idle_ns) == 120, "SimulatedTotals.idle_ns");
static_assert(offsetof(SimulatedTotals, present_ns) == 128, "SimulatedTotals.present_ns");
static_assert(offsetof(SimulatedTotals, waiting_ns) == 136, "SimulatedTotals.waiting_ns");

// The workload of kernels/simulate.cpp and how it is served.
struct SimulateRules {
  const SimulatedRequest* requests;  // [n_requests], by arrival
  SimulatedOutcome* outcomes;  // [n_requests]
  SimulatedTotals* totals;  // [n_instances]
  const int32_t* tokens;  // prompts, or null: they are made from blocks and seeds
  const uint64_t* blocks;  // what a block of a prompt is; equal numbers are equal tokens
  uint64_t n_requests;
  uint64_t seed;  // of prompts, outputs and the law of acceptance
  double acceptance_rate;  // share of the oracle's drafts that hold, drawn by (request, output index)
  double hit_rate;  // share of verifications for which the oracle has any drafts, likewise
  int32_t prompt_room;  // tokens that the prompt ring holds beside drafts of the law; 0: its capacity
  int32_t block_tokens;  // tokens of a block
  int32_t n_instances;
  int32_t router;  // Router
  int32_t affinity_blocks;  // first blocks of a prompt by which PREFIX_AFFINITY routes
  int32_t affinity_percent;  // of the mean load, above which it looks for the next instance
};
static_assert(sizeof(SimulateRules) == 96, "SimulateRules");
static_assert(offsetof(SimulateRules, requests) == 0, "SimulateRules.requests");
static_assert(offsetof(SimulateRules, outcomes) == 8, "SimulateRules.outcomes");
static_assert(offsetof(SimulateRules, totals) == 16, "SimulateRules.totals");
static_assert(offsetof(SimulateRules, tokens) == 24, "SimulateRules.tokens");
static_assert(offsetof(SimulateRules, blocks) == 32, "SimulateRules.blocks");
static_assert(offsetof(SimulateRules, n_requests) == 40, "SimulateRules.n_requests");
static_assert(offsetof(SimulateRules, seed) == 48, "SimulateRules.seed");
static_assert(offsetof(SimulateRules, acceptance_rate) == 56, "SimulateRules.acceptance_rate");
static_assert(offsetof(SimulateRules, hit_rate) == 64, "SimulateRules.hit_rate");
static_assert(offsetof(SimulateRules, prompt_room) == 72, "SimulateRules.prompt_room");
static_assert(offsetof(SimulateRules, block_tokens) == 76, "SimulateRules.block_tokens");
static_assert(offsetof(SimulateRules, n_instances) == 80, "SimulateRules.n_instances");
static_assert(offsetof(SimulateRules, router) == 84, "SimulateRules.router");
static_assert(offsetof(SimulateRules, affinity_blocks) == 88, "SimulateRules.affinity_blocks");
static_assert(offsetof(SimulateRules, affinity_percent) == 92, "SimulateRules.affinity_percent");

// How a simulation ended.
struct SimulateResult {
  uint64_t end_ns;  // virtual time of the last event
  uint64_t rounds;  // of control, over all instances
  int32_t instance;  // that stopped it
  int32_t fault;  // AbortReason, or -1: an instance has requests and nothing to do
};
static_assert(sizeof(SimulateResult) == 24, "SimulateResult");
static_assert(offsetof(SimulateResult, end_ns) == 0, "SimulateResult.end_ns");
static_assert(offsetof(SimulateResult, rounds) == 8, "SimulateResult.rounds");
static_assert(offsetof(SimulateResult, instance) == 16, "SimulateResult.instance");
static_assert(offsetof(SimulateResult, fault) == 20, "SimulateResult.fault");

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
