// The control plane on a virtual clock: the stages as they are, a forward pass that costs what STEP_COSTS says and picks synthetic
// tokens. One instance or a fleet behind a router, event by event in the order of virtual time, on one thread. Memory is that of the
// instances' tables and 128 bytes a request: prompts are made when they are submitted.
//
// A round of control at time t takes what is visible by then, commits the step in flight, plans the next one, and the next round is
// when that step ends; with nothing to do, when the next request becomes visible. The host takes events and records at once.
#include <algorithm>
#include <cmath>
#include <deque>
#include <memory>
#include <queue>
#include <vector>

#include "control.h"
#include "platform/host.h"

using namespace xl;

namespace {

constexpr uint64_t kGolden = 0x9e3779b97f4a7c15u;

// Finalizer of splitmix64 (Steele et al. 2014).
uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// Streams of numbers, one number a (key, index).
struct Draws {
  uint64_t key;
  uint64_t at(uint64_t index) const { return mix(key + index * kGolden); }
  int token(uint64_t index, int vocab_size) const { return int(at(index) % uint64_t(vocab_size)); }
};

// Linear between knots at 1, 2, 4, ... rows, and beyond the last one as before it.
double between_knots(const double (&knots)[kCostKnots], int rows) {
  if (rows <= 0) return 0.0;
  int low = 0;
  while (low < kCostKnots - 2 && (2 << low) <= rows) ++low;
  const double begin = double(1 << low);
  return knots[low] + (knots[low + 1] - knots[low]) * ((double(rows) - begin) / begin);
}

uint64_t step_ns(const StepCosts& costs, const StepRecord& step, int n_filter_rows) {
  double ns = costs.fixed_ns;
  ns += between_knots(costs.row_ns, step.n_rows);
  ns += between_knots(costs.sample_ns, step.n_sample_rows);
  ns += between_knots(costs.filter_ns, n_filter_rows);
  ns += costs.context_ns * double(step.context_tokens);
  ns += costs.attended_ns * double(step.attended_tokens);
  ns += costs.move_ns * double(step.n_moves);
  ns += costs.control_ns;
  ns += costs.control_row_ns * double(step.n_rows);
  return uint64_t(std::floor(ns + 0.5));
}

uint64_t whole_ns(double ns) { return uint64_t(std::floor(ns + 0.5)); }

// The team of a loop whose drafts follow a law: the oracle's answer for an output place is the draft there, and ~draft where a
// verification that begins there finds none. phase_control_at finds its stage_draft by the team's type.
struct LawTeam : HostTeam {
  using HostTeam::HostTeam;
};

void stage_draft(LawTeam& team, const Params& p, const Dims& d, int rows) {
  HostTeam& host = team;
  if (Proposer(p.proposer) != Proposer::kOracle) return xl::stage_draft(host, p, d, rows);
  for (int i = 0; i < p.state->n_order; ++i) {
    Slot& slot = p.slots[p.order[i]];
    const int32_t* answers = p.oracle + size_t(p.order[i]) * size_t(p.max_len);
    const int output_index = slot.length - slot.prompt_len;
    if (output_index < slot.oracle_len && answers[output_index] < 0) slot.oracle_len = -slot.oracle_len;
  }
  xl::stage_draft(host, p, d, rows);
  for (int i = 0; i < p.state->n_order; ++i) {
    Slot& slot = p.slots[p.order[i]];
    if (slot.oracle_len < 0) slot.oracle_len = -slot.oracle_len;
    for (int j = 0; j < slot.n_drafts; ++j)
      if (slot.drafts[j] < 0) slot.drafts[j] = ~slot.drafts[j];
  }
}

struct Instance {
  const Params& p;
  LawTeam team;
  Grid grid;
  std::deque<uint64_t> inbox;   // requests on their way or held back by a full ring, by arrival
  uint64_t round_ns = 0;        // of the last round
  bool scheduled = false;
  bool began = false;
  uint64_t n_present = 0;  // seen, not ended
  uint64_t n_waiting = 0;  // of them never admitted
  uint64_t n_outstanding = 0;   // routed here, and the host has not seen the end
  uint64_t drafts_head = 0, n_drafts = 0;  // drafts of submissions from drafts_head on, which still are in the prompt ring

  explicit Instance(const Params& params)
      : p(params), team(params.scratch), grid{params.grid, params.mailbox, 0, 1, params.spin_deadline_ns, 0} {}
};

struct Fleet {
  const Dims& d;
  const StepCosts& costs;
  const SimulateRules& rules;
  SimulateResult& result;
  std::vector<std::unique_ptr<Instance>> instances;
  uint64_t submit_ns, publish_ns;

  // (time, instance) of rounds to come; equal times by instance, so that a simulation depends on its input alone.
  using Due = std::pair<uint64_t, int>;
  std::priority_queue<Due, std::vector<Due>, std::greater<Due>> rounds;
  std::deque<Due> ends;  // of requests, when the host sees them; by time, since every instance publishes after the same delay
  uint64_t n_outstanding = 0;

  uint64_t visible_ns(uint64_t index) const { return rules.requests[index].arrival_ns + submit_ns; }

  void schedule(int id, uint64_t ns) {
    rounds.push({ns, id});
    instances[size_t(id)]->scheduled = true;
  }

  // --- the router

  int least_outstanding() const {
    size_t best = 0;
    for (size_t id = 1; id < instances.size(); ++id)
      if (instances[id]->n_outstanding < instances[best]->n_outstanding) best = id;
    return int(best);
  }

  // Consistent hashing with bounded loads (Mirrokni et al. 2018): the first instance from the hash on that has less than so much of
  // the mean load.
  int by_prefix(const SimulatedRequest& request) const {
    uint64_t key = 0;
    if (rules.tokens != nullptr) {
      const int count = std::min(request.prompt_len, rules.affinity_blocks * rules.block_tokens);
      for (int i = 0; i < count; ++i) key = Draws{key}.at(uint64_t(rules.tokens[request.tokens_begin + uint64_t(i)]) + 1);
    } else {
      const int count = std::min(request.n_blocks, rules.affinity_blocks);
      if (count == 0) return least_outstanding();
      for (int i = 0; i < count; ++i) key = Draws{key}.at(rules.blocks[request.blocks_begin + uint64_t(i)] + 1);
    }
    const uint64_t n = instances.size();
    const double most = std::ceil(double(rules.affinity_percent) / 100.0 * double(n_outstanding + 1) / double(n));
    uint64_t id = key % n;
    for (uint64_t tried = 0; tried < n && double(instances[id]->n_outstanding) >= most; ++tried) id = (id + 1) % n;
    return int(id);
  }

  int route(uint64_t index) const {
    switch (Router(rules.router)) {
      case Router::kLeastOutstanding:
        return least_outstanding();
      case Router::kPrefixAffinity:
        return by_prefix(rules.requests[index]);
      default:
        return int(index % instances.size());
    }
  }

  void arrive(uint64_t index) {
    const uint64_t now_ns = rules.requests[index].arrival_ns;
    for (; !ends.empty() && ends.front().first <= now_ns; ends.pop_front()) {
      --instances[size_t(ends.front().second)]->n_outstanding;
      --n_outstanding;
    }
    const int id = route(index);
    Instance& one = *instances[size_t(id)];
    SimulatedOutcome& outcome = rules.outcomes[index];
    outcome = SimulatedOutcome{};
    outcome.seen_ns = outcome.admitted_ns = outcome.first_token_ns = outcome.last_token_ns = outcome.finished_ns = -1;
    outcome.instance = id;
    ++rules.totals[id].requests;
    ++one.n_outstanding;
    ++n_outstanding;
    one.inbox.push_back(index);
    if (!one.scheduled) schedule(id, visible_ns(index));
  }

  // --- the host of an instance

  // Output tokens and the law are those of xlpk/simulator/outcomes.py (Synthetic): both sides give the same text and the same drafts.
  Draws of_request(uint64_t index) const { return {mix(mix(rules.seed * kGolden + 1) + index * kGolden)}; }

  int output_token(uint64_t index, int place) const { return of_request(index).token(uint64_t(place), d.vocab_size); }

  // What the oracle drafts there, as LawTeam reads it: the token, or another one.
  int draft_token(uint64_t index, int place) const {
    const Draws law = {of_request(index).key ^ (2 * 0xd1342543de82ef95u)};
    const bool holds = double(law.at(uint64_t(place))) * 0x1p-64 < rules.acceptance_rate;
    const int token = output_token(index, place);
    const int draft = holds ? token : (token + 1) % d.vocab_size;
    if (rules.hit_rate == 1.0) return draft;
    const Draws finds = {of_request(index).key ^ 0xd1342543de82ef95u};
    return double(finds.at(uint64_t(place))) * 0x1p-64 < rules.hit_rate ? draft : ~draft;
  }

  int prompt_token(const SimulatedRequest& request, uint64_t index, int i) const {
    if (rules.tokens != nullptr) return rules.tokens[request.tokens_begin + uint64_t(i)];
    const int block = rules.block_tokens > 0 ? i / rules.block_tokens : 0;
    if (block >= request.n_blocks) return Draws{~of_request(index).key}.token(uint64_t(i), d.vocab_size);
    const uint64_t number = rules.blocks[request.blocks_begin + uint64_t(block)];
    return Draws{mix(~rules.seed + number * kGolden)}.token(uint64_t(i % rules.block_tokens), d.vocab_size);
  }

  // False: a ring is full.
  bool submit(Instance& one, uint64_t index, uint64_t now_ns) {
    const Params& p = one.p;
    Mailbox& box = *p.mailbox;
    const SimulatedRequest& request = rules.requests[index];
    const int n_answers = Proposer(p.proposer) == Proposer::kOracle ? request.max_new_tokens : 0;
    if (box.submit_tail - box.submit_head >= uint64_t(p.submission_capacity)) return false;
    const uint64_t used = box.prompt_tail - box.prompt_head, most = uint64_t(p.prompt_capacity);
    if (used + uint64_t(request.prompt_len + n_answers) > most) return false;
    if (rules.prompt_room > 0) {
      for (; one.drafts_head < box.submit_head; ++one.drafts_head)
        one.n_drafts -= uint64_t(ring_entry(p.submissions, p.submission_capacity, one.drafts_head).oracle_len);
      if (used - one.n_drafts + uint64_t(request.prompt_len) > uint64_t(rules.prompt_room)) return false;
      one.n_drafts += uint64_t(n_answers);
    }
    Submission& s = ring_entry(p.submissions, p.submission_capacity, box.submit_tail);
    s = Submission{};
    s.request_id = index;
    s.prompt_begin = box.prompt_tail;
    s.prompt_len = request.prompt_len;
    s.oracle_len = n_answers;
    s.max_new_tokens = request.max_new_tokens;
    s.ignore_eos = 1;
    s.n_logprobs = -1;
    s.top_p = s.repetition_penalty = 1.0f;
    s.share = request.share;
    if (request.filtered) {  // any filter will do: nothing is filtered, its rows are counted
      s.temperature = 1.0f;
      s.top_k = 1;
    }
    s.priority = request.priority;
    if (request.deadline_ns > 0) {
      // It counts from the arrival, the loop's from when it sees the request; the host subtracts what it held it back itself.
      const bool held = one.began && visible_ns(index) <= one.round_ns;
      const uint64_t late_ns = held ? now_ns - visible_ns(index) : 0;
      s.deadline_ns = request.deadline_ns > late_ns ? request.deadline_ns - late_ns : 1;
    }
    for (int i = 0; i < request.prompt_len; ++i)
      ring_entry(p.prompts, p.prompt_capacity, box.prompt_tail++) = prompt_token(request, index, i);
    for (int i = 0; i < n_answers; ++i) ring_entry(p.prompts, p.prompt_capacity, box.prompt_tail++) = draft_token(index, i);
    ++box.submit_tail;
    return true;
  }

  void take_events(Instance& one, int id, uint64_t now_ns) {
    const Params& p = one.p;
    Mailbox& box = *p.mailbox;
    SimulatedTotals& totals = rules.totals[id];
    for (; box.event_head < box.event_tail; ++box.event_head) {
      const Event& event = ring_entry(p.events, p.event_capacity, box.event_head);
      SimulatedOutcome& outcome = rules.outcomes[event.request_id];
      switch (EventKind(event.kind)) {
        case EventKind::kAdmitted:
          outcome.admitted_ns = int64_t(event.device_ns);
          outcome.n_cached = event.n_cached;
          totals.prompt_tokens += uint64_t(rules.requests[event.request_id].prompt_len);
          totals.cached_tokens += uint64_t(event.n_cached);
          --one.n_waiting;
          break;
        case EventKind::kToken:
          if (event.output_index == 0) outcome.first_token_ns = int64_t(event.device_ns);
          outcome.last_token_ns = int64_t(event.device_ns);
          if (event.n_drafts > 0) {
            outcome.n_drafts += event.n_drafts;
            outcome.n_accepted += event.n_accepted;
          }
          break;
        case EventKind::kFinished:
          outcome.finished_ns = int64_t(event.device_ns);
          outcome.n_output = event.output_index;
          outcome.reason = event.reason;
          if (outcome.admitted_ns < 0) --one.n_waiting;
          --one.n_present;
          ++totals.finished;
          ends.push_back({now_ns + publish_ns, id});
          break;
        case EventKind::kPreempted:
          ++outcome.n_preemptions;
          break;
        case EventKind::kResumed:
          break;
      }
    }
    for (; box.step_head < box.step_tail; ++box.step_head) {
      const StepRecord& record = ring_entry(p.step_records, p.step_capacity, box.step_head);
      ++totals.steps;
      totals.rows += uint64_t(record.n_rows);
      totals.sample_rows += uint64_t(record.n_sample_rows);
      totals.tokens += uint64_t(record.n_tokens);
      totals.recomputed_rows += uint64_t(record.n_recomputed_rows);
      totals.evictions += uint64_t(record.n_evictions);
      totals.preemptions += uint64_t(record.n_preemptions);
      totals.moves += uint64_t(record.n_moves);
      totals.drafts += uint64_t(record.n_draft_rows);
      totals.accepted += uint64_t(record.n_accepted);
    }
  }

  void forward(const Params& p) const {
    const Step& step = *p.step;
    for (int s = 0; s < step.n_sample_rows; ++s) {
      const Row& row = p.rows[p.sample_rows[s]];
      const Slot& slot = p.slots[row.slot];
      const int token = output_token(slot.request_id, row.position + 1 - slot.prompt_len);
      p.best[2 * s] = p.best[2 * s + 1] = pack_candidate(1.0f, token);
    }
  }

  void round(int id, uint64_t now_ns) {
    Instance& one = *instances[size_t(id)];
    const Params& p = one.p;
    SimulatedTotals& totals = rules.totals[id];
    one.scheduled = false;
    totals.present_ns += one.n_present * (now_ns - one.round_ns);
    totals.waiting_ns += one.n_waiting * (now_ns - one.round_ns);
    while (!one.inbox.empty() && visible_ns(one.inbox.front()) <= now_ns && submit(one, one.inbox.front(), now_ns)) {
      rules.outcomes[one.inbox.front()].seen_ns = int64_t(now_ns);
      ++one.n_present;
      ++one.n_waiting;
      one.inbox.pop_front();
    }
    one.round_ns = now_ns;
    one.began = true;
    phase_control_at(one.team, one.grid, p, d, now_ns);
    ++result.rounds;
    take_events(one, id, now_ns);
    result.end_ns = now_ns;
    if (p.grid->abort) return fail(id, int(p.grid->abort));
    if (p.step->n_rows > 0) {
      forward(p);
      const uint64_t ns = std::max<uint64_t>(1, step_ns(costs, *p.record, p.step->n_filter_rows));
      totals.busy_ns += ns;
      schedule(id, now_ns + ns);
    } else if (!one.inbox.empty() && visible_ns(one.inbox.front()) > now_ns) {
      schedule(id, visible_ns(one.inbox.front()));
    } else if (!one.inbox.empty() || one.n_present > 0) {
      fail(id, -1);
    }
  }

  void fail(int id, int fault) {
    result.instance = id;
    result.fault = fault;
  }

  void run() {
    for (uint64_t next = 0; result.fault == 0 && (next < rules.n_requests || !rounds.empty());) {
      // Who arrives at the time of a round is routed before it.
      if (next < rules.n_requests && (rounds.empty() || rules.requests[next].arrival_ns <= rounds.top().first)) {
        arrive(next++);
        continue;
      }
      const Due due = rounds.top();
      rounds.pop();
      round(due.second, due.first);
    }
    for (size_t id = 0; id < instances.size(); ++id) {
      SimulatedTotals& totals = rules.totals[id];
      totals.idle_ns = result.end_ns - totals.busy_ns;
    }
  }
};

}  // namespace

extern "C" {

// Serves all requests of `rules` on n_instances sessions, `params` [n_instances]; totals start at zero.
void xl_simulate(const Params* params, const xl::Dims* dims, const StepCosts* costs, const SimulateRules* rules, SimulateResult* result) {
  *result = SimulateResult{};
  Fleet fleet{*dims, *costs, *rules, *result, {}, whole_ns(costs->submit_ns), whole_ns(costs->publish_ns), {}, {}};
  for (int id = 0; id < rules->n_instances; ++id) fleet.instances.push_back(std::make_unique<Instance>(params[id]));
  fleet.run();
}

// One round of control at `now_ns`, for a host that keeps the clock and samples the rows itself (xlpk/backends/compiled_plane.py).
void xl_round(const Params* params, const xl::Dims* dims, uint64_t now_ns) {
  Instance one(*params);
  phase_control_at(one.team, one.grid, one.p, *dims, now_ns);
}

// A request that another loop has prefilled: it waits as one that was preempted behind `tokens` [n_tokens], prompt and first output,
// and finds K and V of all but the last in places of the swap space from `place` on. `submission`: its deadline is a time of this
// clock. `answers`: [oracle_len]. A slot is free.
void xl_adopt(const Params* params, const xl::Dims* dims, const Submission* submission, const int32_t* tokens, int32_t n_tokens,
              const int32_t* answers, uint64_t number, int32_t place) {
  const Params& p = *params;
  LoopState& state = *p.state;
  ring_entry(p.queue, p.submission_capacity, number) = *submission;
  QueueEntry entry = {};
  entry.rank = rank_of(p, *submission, state.n_steps);
  entry.number = number;
  entry.slot = -1;
  const int slot_id = open_slot(p, entry);
  Slot& slot = p.slots[slot_id];
  slot.state = int(SlotState::kPreempted);
  slot.length = n_tokens;
  std::copy_n(tokens, n_tokens, tokens_of(p, slot_id));
  std::copy_n(answers, submission->oracle_len, p.oracle + size_t(slot_id) * size_t(p.max_len));
  slot.swapped_tokens = n_tokens - 1;
  slot.n_swapped = pages_for(slot.swapped_tokens, dims->page_size);
  for (int i = 0; i < slot.n_swapped; ++i) swap_table_of(p, slot_id)[i] = place + i;
  if (slot.deadline_ns != 0 && (state.next_deadline_ns == 0 || slot.deadline_ns < state.next_deadline_ns))
    state.next_deadline_ns = slot.deadline_ns;
  ++state.n_preempted;
  queue_push(p, entry.rank, number, slot_id);
}

// The cost of a step alone, in nanoseconds, for comparison with xlpk/costs.py.
uint64_t xl_step_ns(const StepCosts* costs, const StepRecord* step, int32_t n_filter_rows) {
  return step_ns(*costs, *step, n_filter_rows);
}

}  // extern "C"
