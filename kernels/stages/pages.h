// pages: the pool. FREE (on a stack) -> ACTIVE (held by page tables) -> CACHED (held by nobody, found by its content) -> FREE or
// ACTIVE again. Every function here runs on one thread and takes constant time, but for the walks that say so.
//
// A full page is addressable: a hash of its tokens and of all before them leads to it, and only equal tokens behind the same
// parent count as found. Kwon et al. 2023 (vLLM) chain hashes in this way.
#pragma once

#include "sync.h"
#include "trace.h"

namespace xl {

XL_FN int pages_for(int tokens, int page_size) { return (tokens + page_size - 1) / page_size; }

XL_FN int32_t* tokens_of(const Params& p, int slot) { return p.tokens + size_t(slot) * size_t(p.max_len); }

XL_FN int32_t* page_table_of(const Params& p, int slot) { return p.page_table + size_t(slot) * size_t(p.max_slot_pages); }

// Chained over the pages of a sequence: `parent` is the hash of the page before, 0 for the first. Finalizer of splitmix64
// (Steele et al. 2014) per token.
XL_FN uint64_t hash_page(uint64_t parent, const int32_t* tokens, int page_size) {
  uint64_t hash = parent ^ 0x9e3779b97f4a7c15u;
  for (int i = 0; i < page_size; ++i) {
    hash += uint64_t(uint32_t(tokens[i])) + 0x9e3779b97f4a7c15u;
    hash = (hash ^ (hash >> 30)) * 0xbf58476d1ce4e5b9u;
    hash = (hash ^ (hash >> 27)) * 0x94d049bb133111ebu;
    hash ^= hash >> 31;
  }
  return hash;
}

XL_FN int32_t& bucket_of(const Params& p, uint64_t hash) { return p.buckets[hash & uint64_t(p.n_buckets - 1)]; }

// The addressable page with these tokens behind `parent`, or -1. Walks one bucket.
XL_FN int find_page(const Params& p, uint64_t hash, uint64_t parent, const int32_t* tokens, int page_size) {
  for (int page = bucket_of(p, hash); page >= 0; page = p.pages[page].bucket_next) {
    const Page& candidate = p.pages[page];
    if (candidate.hash != hash || candidate.parent != parent) continue;
    const int32_t* own = p.page_tokens + size_t(page) * size_t(page_size);
    int same = 0;
    while (same < page_size && own[same] == tokens[same]) ++same;
    if (same == page_size) return page;
  }
  return -1;
}

// Eviction lists. LRU and SLRU list cached pages in the order in which they were let go, FIFO addressable pages in the order in
// which they became so. SLRU (Karedla et al. 1994): list 1 has those that were found at least once, up to kProtectedShare of all
// pages; those that were not go first, so prompts that nobody repeats cannot push out a prefix that many share.
constexpr int kLists = 2;

XL_FN void list_page(const Params& p, int page, int list) {
  LoopState& state = *p.state;
  Page& entry = p.pages[page];
  entry.list = list;
  entry.newer = -1;
  entry.older = state.newest[list];
  if (entry.older >= 0)
    p.pages[entry.older].newer = page;
  else
    state.oldest[list] = page;
  state.newest[list] = page;
  ++state.n_listed[list];
}

XL_FN void unlist_page(const Params& p, int page) {
  LoopState& state = *p.state;
  Page& entry = p.pages[page];
  const int list = entry.list;
  if (list < 0) return;
  if (entry.older >= 0)
    p.pages[entry.older].newer = entry.newer;
  else
    state.oldest[list] = entry.newer;
  if (entry.newer >= 0)
    p.pages[entry.newer].older = entry.older;
  else
    state.newest[list] = entry.older;
  entry.list = entry.older = entry.newer = -1;
  --state.n_listed[list];
}

// A cached page takes its place among those that may be evicted.
XL_FN void list_cached(const Params& p, int page) {
  LoopState& state = *p.state;
  if (Eviction(p.eviction) == Eviction::kFifo) return;  // listed since it became addressable
  const bool found = Eviction(p.eviction) == Eviction::kSlru && p.pages[page].hits > 0;
  list_page(p, page, found ? 1 : 0);
  if (state.n_listed[1] > p.n_pages - p.n_pages / kProtectedShare) {
    const int demoted = state.oldest[1];
    unlist_page(p, demoted);
    list_page(p, demoted, 0);
    trace(p, TraceKind::kDemote, 0, demoted);
  }
}

// The cached page that the policy gives up first, or -1. FIFO walks past pages that are held.
XL_FN int oldest_cached(const Params& p) {
  int page = p.state->oldest[0];
  while (page >= 0 && p.pages[page].refs > 0) page = p.pages[page].newer;
  return page >= 0 ? page : p.state->oldest[1];
}

// Walks one bucket.
XL_FN void forget_content(const Params& p, int page) {
  Page& entry = p.pages[page];
  if (entry.content == 0) return;
  int32_t* link = &bucket_of(p, entry.hash);
  while (*link != page) link = &p.pages[*link].bucket_next;
  *link = entry.bucket_next;
  entry.content = 0;
  entry.hits = 0;
}

// A page for a new owner: a free one, else a cached one whose content is forgotten; -1: there is neither.
XL_FN int take_page(const Grid& grid, const Params& p) {
  LoopState& state = *p.state;
  int page;
  if (state.n_free_pages > 0) {
    page = p.free_pages[--state.n_free_pages];
  } else {
    if (state.n_cached_pages == 0) return -1;
    page = oldest_cached(p);
    trace(p, TraceKind::kEvict, p.pages[page].content, page);
    unlist_page(p, page);
    forget_content(p, page);
    --state.n_cached_pages;
    ++state.n_evictions;
  }
  Page& entry = p.pages[page];
  if (entry.refs != 0) {
    grid.abort(AbortReason::kPageDoubleAllocation);
    return -1;
  }
  entry.refs = 1;
  ++state.n_refs;
  ++state.n_active_pages;
  trace(p, TraceKind::kAlloc, 0, page);
  return page;
}

// One more table holds an addressable page.
XL_FN void hold_page(const Params& p, int page) {
  LoopState& state = *p.state;
  Page& entry = p.pages[page];
  if (entry.refs++ == 0) {
    if (Eviction(p.eviction) != Eviction::kFifo) unlist_page(p, page);
    --state.n_cached_pages;
    ++state.n_active_pages;
  }
  ++state.n_refs;
  trace(p, TraceKind::kHold, entry.content, page, entry.refs);
}

// An addressable page is held for good.
XL_FN void pin_page(const Params& p, int page) {
  LoopState& state = *p.state;
  Page& entry = p.pages[page];
  if (entry.pinned) return;
  entry.pinned = 1;
  ++entry.refs;
  ++state.n_refs;
  ++state.n_pinned_pages;
  trace(p, TraceKind::kPin, entry.content, page, entry.refs);
}

// One table less holds the page; the last one leaves it cached if it is addressable, else free.
XL_FN void release_page(const Grid& grid, const Params& p, int page) {
  LoopState& state = *p.state;
  Page& entry = p.pages[page];
  if (entry.refs <= 0) return grid.abort(AbortReason::kPageDoubleFree);
  --state.n_refs;
  --entry.refs;
  trace(p, TraceKind::kRelease, 0, page, entry.refs, entry.refs > 0 ? 2 : entry.content != 0);
  if (entry.refs > 0) return;
  --state.n_active_pages;
  if (entry.content != 0) {
    ++state.n_cached_pages;
    list_cached(p, page);
  } else {
    p.free_pages[state.n_free_pages++] = page;
  }
}

// A full page becomes addressable; its content is new.
XL_FN void register_page(const Params& p, int page, uint64_t hash, uint64_t parent, const int32_t* tokens, int page_size) {
  Page& entry = p.pages[page];
  entry.hash = hash;
  entry.parent = parent;
  entry.content = ++p.state->n_contents;
  entry.hits = 0;
  trace(p, TraceKind::kPublish, entry.content, page);
  int32_t* own = p.page_tokens + size_t(page) * size_t(page_size);
  for (int i = 0; i < page_size; ++i) own[i] = tokens[i];
  int32_t& bucket = bucket_of(p, hash);
  entry.bucket_next = bucket;
  bucket = page;
  if (Eviction(p.eviction) == Eviction::kFifo) list_page(p, page, 0);
}

}  // namespace xl
