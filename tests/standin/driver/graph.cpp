// Stream capture and graphs. A graph is the captured operations in order; nodes cannot be built or changed one by one.

#include "standin.h"

namespace {

struct Graph {
  std::vector<standin::Operation> nodes;
};

Graph* graph_of(void* handle) { return static_cast<Graph*>(handle); }

}  // namespace

using namespace standin;

extern "C" {

CUresult cuStreamBeginCapture(CUstream handle, CUstreamCaptureMode mode) {
  STANDIN_ENTER();
  Stream* stream = find_stream(handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  if (is_default(handle)) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  if (stream->capture) return CUDA_ERROR_ILLEGAL_STATE;
  stream->capture.reset(new Capture{mode, std::this_thread::get_id()});
  return CUDA_SUCCESS;
}

CUresult cuStreamEndCapture(CUstream handle, CUgraph* graph) {
  STANDIN_ENTER();
  Stream* stream = find_stream(handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  if (!stream->capture) return CUDA_ERROR_ILLEGAL_STATE;
  const std::unique_ptr<Capture> capture = std::move(stream->capture);
  *graph = nullptr;
  if (capture->broken) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
  *graph = reinterpret_cast<CUgraph>(new Graph{std::move(capture->operations)});
  return CUDA_SUCCESS;
}

CUresult cuStreamIsCapturing(CUstream handle, CUstreamCaptureStatus* status) {
  STANDIN_ENTER();
  Stream* stream = find_stream(handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  const Capture* capture = stream->capture.get();
  *status = !capture          ? CU_STREAM_CAPTURE_STATUS_NONE
            : capture->broken ? CU_STREAM_CAPTURE_STATUS_INVALIDATED
                              : CU_STREAM_CAPTURE_STATUS_ACTIVE;
  return CUDA_SUCCESS;
}

CUresult cuGraphGetNodes(CUgraph handle, CUgraphNode* nodes, size_t* count) {
  STANDIN_ENTER();
  if (nodes) return CUDA_ERROR_NOT_SUPPORTED;
  *count = graph_of(handle)->nodes.size();
  return CUDA_SUCCESS;
}

CUresult cuGraphInstantiate(CUgraphExec* executable, CUgraph handle, unsigned long long) {
  STANDIN_ENTER();
  if (breaks_capture()) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  *executable = reinterpret_cast<CUgraphExec>(new Graph(*graph_of(handle)));
  return CUDA_SUCCESS;
}

CUresult cuGraphUpload(CUgraphExec, CUstream) {
  STANDIN_ENTER();
  return CUDA_SUCCESS;
}

CUresult cuGraphLaunch(CUgraphExec executable, CUstream handle) {
  STANDIN_ENTER();
  Stream* stream = find_stream(handle);
  if (!stream || !executable) return CUDA_ERROR_INVALID_HANDLE;
  if (stream->capture) return CUDA_ERROR_NOT_SUPPORTED;
  if (launch_is_refused()) return CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES;
  ++counters().graph_launches;
  for (Operation operation : graph_of(executable)->nodes) {
    if (operation.kind == Operation::kKernel) {
      ++counters().graph_kernels;
      operation.count = {};
    }
    if (CUresult error = submit(handle, std::move(operation)); error != CUDA_SUCCESS) return error;
  }
  return CUDA_SUCCESS;
}

CUresult cuGraphDestroy(CUgraph handle) {
  STANDIN_ENTER();
  delete graph_of(handle);
  return CUDA_SUCCESS;
}

CUresult cuGraphExecDestroy(CUgraphExec handle) {
  STANDIN_ENTER();
  delete graph_of(handle);
  return CUDA_SUCCESS;
}

}  // extern "C"
