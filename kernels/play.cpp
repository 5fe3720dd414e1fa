// The control plane alone: the stages as they are, with a forward pass that stores each row's token in its page and picks the next
// token from what it finds there, for each position up to the row's own. A page that was clobbered, shared wrongly or read too
// late changes the text, which is checked against the sequence itself. Time is virtual, so a play depends on its rules alone. For
// tests and for measuring control.
#include <algorithm>
#include <cstring>
#include <deque>
#include <unordered_map>
#include <vector>

#include "control.h"
#include "platform/host.h"

using namespace xl;

namespace {

constexpr uint64_t kRoundNs = 6000;  // a round takes at most as long on the virtual clock

// A stream of numbers of its own (splitmix64).
struct Random {
  uint64_t state;
  uint64_t next() {
    uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int below(int n) { return int(next() % uint64_t(n)); }
  bool one_in(int n) { return n > 0 && below(n) == 0; }
};

// The token after a sequence; few different ones, so that n-gram drafts are found, accepted and rejected.
struct Chain {
  uint64_t hash;
  void add(int token) { hash = (hash ^ uint64_t(uint32_t(token) + 1)) * 0x100000001b3u + 0x9e3779b97f4a7c15u; }
  int next(int vocab_size) const { return int((hash >> 33) % 7 == 0 ? (hash >> 40) % uint64_t(vocab_size) : (hash >> 13) % 2); }
};

struct Live {
  std::vector<int32_t> tokens;  // prompt, then output
  uint64_t index;  // in PlayRules.requests
  int prompt_len, max_new_tokens;
  uint64_t seed;
  bool admitted, cancelled, share, pin;
};

struct Player {
  const Params& p;
  const Dims& d;
  const PlayRules& rules;
  PlayResult& out;
  Random random;
  std::vector<int32_t> stored;  // [n_pages, page_size]: token + 1 + vocab_size * position; 0: nothing
  std::vector<int32_t> swapped;  // [n_swap_pages, page_size]
  std::unordered_map<uint64_t, Live> live;
  std::vector<std::vector<int32_t>> prefixes;
  uint64_t next_id = 1;
  int pinned_pages = 0;  // at most, of all pins

  void fail(PlayFault fault, int detail = 0) {
    if (out.fault == 0) out.fault = int(fault), out.detail = detail;
  }

  int geometric(int mean) {
    int n = 1;
    while (n < 6 * mean && random.below(mean) != 0) ++n;
    return n;
  }

  // False: a ring is full.
  bool submit() {
    Mailbox& box = *p.mailbox;
    if (box.submit_tail - box.submit_head >= uint64_t(p.submission_capacity)) return false;
    Live one = {};
    const bool common = !prefixes.empty() && random.below(2);
    if (common) one.tokens = prefixes[size_t(random.below(int(prefixes.size())))];
    for (int n = common && random.one_in(4) ? 0 : geometric(rules.mean_prompt); n > 0; --n) one.tokens.push_back(random.below(d.vocab_size));
    const int room = (p.n_pages - pinned_pages) * d.page_size, most = p.max_len < room ? p.max_len : room;
    if (int(one.tokens.size()) > most - 1) one.tokens.resize(size_t(most - 1));
    one.prompt_len = int(one.tokens.size());
    one.max_new_tokens = geometric(rules.mean_output);
    if (one.prompt_len + one.max_new_tokens > most) one.max_new_tokens = most - one.prompt_len;
    one.seed = random.next();
    one.pin = out.requests < uint64_t(rules.pins);
    if (one.pin) pinned_pages += one.prompt_len / d.page_size;
    one.share = !random.one_in(rules.private_one_in) || one.pin;
    std::vector<int32_t> answers;
    if (Proposer(p.proposer) == Proposer::kOracle) {
      Chain chain = {one.seed};
      for (int32_t token : one.tokens) chain.add(token);
      for (int i = 0; i < one.max_new_tokens; ++i) {
        answers.push_back(chain.next(d.vocab_size));
        chain.add(answers.back());
      }
    }
    if (box.prompt_tail + one.tokens.size() + answers.size() - box.prompt_head > uint64_t(p.prompt_capacity)) return false;
    Submission s = {};
    s.request_id = next_id;
    s.prompt_begin = box.prompt_tail;
    s.seed = one.seed;
    s.prompt_len = one.prompt_len;
    s.oracle_len = int(answers.size());
    s.max_new_tokens = one.max_new_tokens;
    s.ignore_eos = 1;
    s.n_logprobs = -1;
    s.top_p = s.repetition_penalty = 1.0f;
    s.share = one.share;
    s.pin = one.pin;
    s.priority = rules.priorities > 1 ? random.below(rules.priorities) : 0;
    s.deadline_ns = random.one_in(rules.deadline_one_in) ? 1 + random.next() % 200000 : 0;
    for (int32_t token : one.tokens) ring_entry(p.prompts, p.prompt_capacity, box.prompt_tail++) = token;
    for (int32_t token : answers) ring_entry(p.prompts, p.prompt_capacity, box.prompt_tail++) = token;
    ring_entry(p.submissions, p.submission_capacity, box.submit_tail) = s;
    ++box.submit_tail;
    if (rules.requests) {
      PlayRequest& kept = rules.requests[out.requests];
      kept.request_id = next_id;
      kept.seed = one.seed;
      kept.deadline_ns = s.deadline_ns;
      kept.prompt_len = one.prompt_len;
      kept.max_new_tokens = one.max_new_tokens;
      kept.priority = s.priority;
      kept.share = s.share;
      kept.pin = s.pin;
      kept.n_answers = s.oracle_len;
      int32_t* text = rules.texts + out.requests * uint64_t(p.max_len);
      std::copy(one.tokens.begin(), one.tokens.end(), text);
      std::copy(answers.begin(), answers.end(), text + one.prompt_len);
    }
    one.index = out.requests;
    out.prompt_tokens += uint64_t(one.prompt_len);
    ++out.requests;
    live.emplace(next_id++, std::move(one));
    return true;
  }

  void cancel_one() {
    Mailbox& box = *p.mailbox;
    if (box.cancel_tail - box.cancel_head >= uint64_t(p.submission_capacity)) return;
    const uint64_t id = next_id > 200 ? next_id - 1 - uint64_t(random.below(200)) : uint64_t(random.below(int(next_id)));
    ring_entry(p.cancels, p.submission_capacity, box.cancel_tail++) = id;
    if (const auto found = live.find(id); found != live.end()) found->second.cancelled = true;
  }

  // All rows store before any of them reads, as the phases do.
  void forward() {
    const bool checks = rules.recount_every > 0;
    const Step& step = *p.step;
    out.moves += uint64_t(step.n_moves);
    std::unordered_map<int32_t*, int> touched;  // 1: read, 2: written; moves of a step happen in any order
    for (int i = 0; checks && i < step.n_moves; ++i) {
      const Move& move = p.moves[i];
      int32_t* page = &stored[size_t(move.page) * size_t(d.page_size)];
      int32_t* place = &swapped[size_t(move.swap_page) * size_t(d.page_size)];
      if (touched[move.out ? place : page]++ || touched[move.out ? page : place] > 1) return fail(PlayFault::kSwap, -1);
      touched[move.out ? place : page] = 2;
      touched[move.out ? page : place] = 1;
      memcpy(move.out ? place : page, move.out ? page : place, sizeof(int32_t) * size_t(d.page_size));
    }
    if (checks)
      for (int r = 0; r < step.n_rows; ++r) {
        const Row& row = p.rows[r];
        const int page = page_table_of(p, row.slot)[row.position / d.page_size];
        stored[size_t(page) * size_t(d.page_size) + size_t(row.position % d.page_size)] =
            row.token + 1 + d.vocab_size * row.position;
      }
    for (int s = 0; s < step.n_sample_rows; ++s) {
      const Row& row = p.rows[p.sample_rows[s]];
      const Slot& slot = p.slots[row.slot];
      Chain chain = {slot.seed};
      if (checks) {
        const int32_t* table = page_table_of(p, row.slot);
        for (int i = 0; i <= row.position; ++i) {
          const int32_t cell = stored[size_t(table[i / d.page_size]) * size_t(d.page_size) + size_t(i % d.page_size)];
          if (cell == 0 || (cell - 1) / d.vocab_size != i) return fail(PlayFault::kPageContent, i);
          chain.add((cell - 1) % d.vocab_size);
        }
      } else {
        chain.add(row.position);
        chain.add(row.token);
      }
      p.best[2 * s] = p.best[2 * s + 1] = pack_candidate(1.0f, chain.next(d.vocab_size));
    }
  }

  void take_events() {
    Mailbox& box = *p.mailbox;
    for (; box.event_head < box.event_tail; ++box.event_head) {
      const Event& event = ring_entry(p.events, p.event_capacity, box.event_head);
      ++out.events;
      const auto found = live.find(event.request_id);
      if (found == live.end()) return fail(PlayFault::kTwoEnds, int(event.request_id));
      Live& one = found->second;
      switch (EventKind(event.kind)) {
        case EventKind::kAdmitted:
          if (one.admitted || event.n_cached >= one.prompt_len || event.n_cached % d.page_size) return fail(PlayFault::kCachedHit, event.n_cached);
          if (!one.share && event.n_cached) return fail(PlayFault::kCachedHit, event.n_cached);
          one.admitted = true;
          out.cached_tokens += uint64_t(event.n_cached);
          break;
        case EventKind::kToken: {
          if (!one.admitted || event.output_index != int(one.tokens.size()) - one.prompt_len) return fail(PlayFault::kAdmission, event.output_index);
          if (rules.recount_every > 0) {
            Chain chain = {one.seed};
            for (int32_t token : one.tokens) chain.add(token);
            if (event.token != chain.next(d.vocab_size)) return fail(PlayFault::kText, event.output_index);
          }
          if (rules.requests) {
            rules.texts[one.index * uint64_t(p.max_len) + one.tokens.size()] = event.token;
            ++rules.requests[one.index].n_output;
          }
          if (event.n_drafts >= 0) out.drafts += uint64_t(event.n_drafts), out.accepted += uint64_t(event.n_accepted);
          one.tokens.push_back(event.token);
          break;
        }
        case EventKind::kFinished:
          if (event.output_index != int(one.tokens.size()) - one.prompt_len) return fail(PlayFault::kAdmission, event.output_index);
          if (FinishReason(event.reason) == FinishReason::kLength) {
            if (int(one.tokens.size()) != one.prompt_len + one.max_new_tokens) return fail(PlayFault::kText, event.output_index);
            ++out.finished;
          } else if (FinishReason(event.reason) == FinishReason::kCancelled) {
            if (!one.cancelled) return fail(PlayFault::kTwoEnds, event.reason);
            ++out.cancelled;
          } else if (FinishReason(event.reason) == FinishReason::kDeadline) {
            ++out.late;
          } else {
            return fail(PlayFault::kTwoEnds, event.reason);
          }
          live.erase(found);
          break;
        case EventKind::kPreempted:
          ++out.preemptions;
          break;
        case EventKind::kResumed:
          break;
      }
    }
  }

  void take_records() {
    Mailbox& box = *p.mailbox;
    for (; box.step_head < box.step_tail; ++box.step_head) {
      const StepRecord& record = ring_entry(p.step_records, p.step_capacity, box.step_head);
      ++out.steps;
      out.rows += uint64_t(record.n_rows);
      out.evictions += uint64_t(record.n_evictions);
      out.recomputed_rows += uint64_t(record.n_recomputed_rows);
      if (record.pages_free + record.pages_cached + record.pages_active + record.pages_draft != record.pages_total) return fail(PlayFault::kCounts);
      if (record.pages_locked > record.pages_active || record.live_tokens > record.live_pages * d.page_size) return fail(PlayFault::kCounts, 1);
      if (record.live_pages > p.n_pages || record.live_tokens < 0) return fail(PlayFault::kCounts, 2);
    }
  }

  // Everything counted anew from the tables.
  void recount() {
    const LoopState& state = *p.state;
    std::vector<int> refs(size_t(p.n_pages), 0), seen(size_t(p.n_pages), 0);
    for (int i = 0; i < state.n_order; ++i) {
      const Slot& slot = p.slots[p.order[i]];
      if (i > 0) {
        const Slot& before = p.slots[p.order[i - 1]];
        if (!goes_before(before.rank, before.number, slot.rank, slot.number)) return fail(PlayFault::kOrder);
      }
      const int32_t* table = page_table_of(p, p.order[i]);
      for (int j = 0; j < slot.n_pages; ++j) ++refs[size_t(table[j])];
      uint64_t parent = 0;
      for (int j = 0; j < slot.n_addressable; ++j) {
        const Page& page = p.pages[table[j]];
        const int32_t* tokens = tokens_of(p, p.order[i]) + j * d.page_size;
        if (page.content == 0 || page.parent != parent) return fail(PlayFault::kBuckets, 1);
        if (memcmp(p.page_tokens + size_t(table[j]) * size_t(d.page_size), tokens, sizeof(int32_t) * size_t(d.page_size)))
          return fail(PlayFault::kBuckets, 2);
        parent = page.content;
      }
      for (int j = slot.n_addressable; j < slot.n_pages; ++j)
        if (p.pages[table[j]].content != 0) return fail(PlayFault::kBuckets, 3);
    }
    std::vector<int> places(size_t(p.n_swap_pages), 0);
    for (int i = 0; i < state.n_free_swap; ++i) ++places[size_t(p.swap_free[i])];
    for (int slot = 0; slot < p.max_slots; ++slot)
      for (int i = 0; i < p.slots[slot].n_swapped; ++i) ++places[size_t(swap_table_of(p, slot)[i])];
    for (int i = 0; i < p.n_swap_pages; ++i)
      if (places[size_t(i)] != 1) return fail(PlayFault::kSwap, i);
    int n_cached = 0, n_active = 0, n_addressable = 0, total = 0;
    int n_pinned = 0, n_free_slots = 0, n_preempted = 0;
    for (int slot = 0; slot < p.max_slots; ++slot) {
      n_free_slots += p.slots[slot].state == int(SlotState::kFree);
      n_preempted += p.slots[slot].state == int(SlotState::kPreempted);
    }
    if (n_free_slots != state.n_free_slots || n_preempted != state.n_preempted) return fail(PlayFault::kCounts, 5);
    for (int i = 0; i < p.n_pages; ++i) {
      n_pinned += p.pages[i].pinned;
      if (p.pages[i].pinned) ++refs[size_t(i)];
      if (p.pages[i].refs != refs[size_t(i)]) return fail(PlayFault::kRefs, i);
      total += refs[size_t(i)];
      n_active += refs[size_t(i)] > 0;
      n_addressable += p.pages[i].content != 0;
      n_cached += refs[size_t(i)] == 0 && p.pages[i].content != 0;
    }
    for (int i = 0; i < state.n_free_pages; ++i) {
      const int page = p.free_pages[i];
      if (refs[size_t(page)] || p.pages[page].content || seen[size_t(page)]++) return fail(PlayFault::kFreePage, page);
    }
    if (n_pinned != state.n_pinned_pages) return fail(PlayFault::kCounts, 6);
    if (n_cached != state.n_cached_pages || n_active != state.n_active_pages || total != state.n_refs) return fail(PlayFault::kCounts, 3);
    if (state.n_free_pages + n_cached + n_active != p.n_pages) return fail(PlayFault::kCounts, 4);
    int listed = 0, found = 0;
    int on_lists[kLists] = {0, 0};
    for (int i = 0; i < p.n_pages; ++i)
      if (p.pages[i].list >= 0) ++on_lists[p.pages[i].list];
    if (on_lists[0] != state.n_listed[0] || on_lists[1] != state.n_listed[1]) return fail(PlayFault::kLists, -2);
    for (int list = 0; list < kLists; ++list)
      for (int page = state.oldest[list], before = -1; page >= 0; before = page, page = p.pages[page].newer) {
        if (p.pages[page].list != list || p.pages[page].older != before || ++listed > p.n_pages) return fail(PlayFault::kLists, page);
        if (p.pages[page].content == 0) return fail(PlayFault::kCachedPage, page);
        if (Eviction(p.eviction) != Eviction::kFifo && refs[size_t(page)]) return fail(PlayFault::kCachedPage, page);
      }
    if (listed != (Eviction(p.eviction) == Eviction::kFifo ? n_addressable : n_cached)) return fail(PlayFault::kLists, -1);
    for (int b = 0; b < p.n_buckets; ++b)
      for (int page = p.buckets[b]; page >= 0; page = p.pages[page].bucket_next)
        if (p.pages[page].content == 0 || ++found > p.n_pages) return fail(PlayFault::kBuckets, 4);
    if (found != n_addressable) return fail(PlayFault::kBuckets, 5);
    for (int at = 1; at < state.n_queued; ++at)
      if (!goes_before(p.heap[(at - 1) / 2], p.heap[at])) return fail(PlayFault::kOrder, at);
  }
};

}  // namespace

extern "C" {

// Plays until `max_requests` were submitted and all have ended, or `max_events` have come.
void xl_play(const Params* params, const xl::Dims* dims, const PlayRules* rules, PlayResult* result) {
  *result = PlayResult{};
  Player player{*params, *dims, *rules, *result, Random{rules->seed}, {}, {}, {}, {}};
  const Params& p = *params;
  player.stored.assign(size_t(p.n_pages) * size_t(dims->page_size), 0);
  player.swapped.assign(size_t(p.n_swap_pages) * size_t(dims->page_size), 0);
  for (int i = 0; i < rules->prefixes; ++i) {
    player.prefixes.emplace_back();
    for (int j = 0; j < rules->prefix_tokens; ++j) player.prefixes.back().push_back(player.random.below(dims->vocab_size));
  }
  HostTeam team(p.scratch);
  const Grid grid{p.grid, p.mailbox, 0, 1, p.spin_deadline_ns, 0};
  Random clock{~rules->seed};
  uint64_t next_recount = uint64_t(rules->recount_every), quiet = 0, now_ns = 1;
  while (result->fault == 0 && result->events < rules->max_events) {
    if (result->requests < rules->max_requests)
      for (int i = 0; (i < rules->arrivals_per_step || player.live.empty()) && player.submit(); ++i) {
      }
    else if (player.live.empty())
      break;
    if (player.random.one_in(rules->cancel_one_in)) player.cancel_one();
    const uint64_t begin_ns = clock_ns(), events = result->events;
    phase_control_at(team, grid, p, *dims, now_ns);
    result->control_ns += clock_ns() - begin_ns;
    now_ns += 1 + clock.next() % kRoundNs;
    if (p.grid->abort) player.fail(PlayFault::kAborted, int(p.grid->abort));
    // A host that is away: the loop stands when its rings are full.
    if (!player.random.one_in(rules->away_one_in)) {
      player.take_events();
      player.take_records();
    }
    if (p.step->n_rows > 0) {
      for (int i = 0; i < rules->arrivals_beside && result->requests < rules->max_requests && player.submit(); ++i) {
      }
      if (rules->prepares) prepare_requests_at(team, p, *dims, now_ns - 1);
      player.forward();
    }
    if (rules->recount_every > 0 && result->events >= next_recount) {
      player.recount();
      next_recount = result->events + uint64_t(rules->recount_every);
    }
    quiet = result->events == events && p.step->n_rows == 0 ? quiet + 1 : 0;
    if (quiet > 10000) player.fail(PlayFault::kStuck);
  }
  if (result->fault == 0 && result->requests >= rules->max_requests && result->events < rules->max_events) {
    if (!player.live.empty()) player.fail(PlayFault::kNeverEnded);
    if (rules->recount_every > 0) player.recount();
    if (p.state->n_refs != p.state->n_pinned_pages || p.state->n_active_pages != p.state->n_pinned_pages || p.state->n_order || p.state->n_queued || p.state->n_free_swap != p.n_swap_pages)
      player.fail(PlayFault::kLeftOver);
    if (p.state->submit_head != p.mailbox->submit_tail || p.state->prompt_head != p.mailbox->prompt_tail) player.fail(PlayFault::kLeftOver, 1);
  }
}

}  // extern "C"
