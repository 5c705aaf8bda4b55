// Collectives between such devices, each in a process of its own: gloo's, of the same memory. As
// NCCL, and unlike gloo, they refuse tensors of the host. They are done when they return.

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/utils/pybind.h>

#include "apart.h"

namespace apart {
namespace {

using c10d::ReduceOp;
using Tensors = std::vector<at::Tensor>;
using Result = c10::intrusive_ptr<c10d::Work>;

struct Done final : c10d::Work {
  explicit Done(const Tensors& results)
      : future(c10::make_intrusive<c10::ivalue::Future>(c10::ListType::ofTensors())) {
    future->markCompleted(c10::List<at::Tensor>(results));
    finish();
  }
  bool wait(std::chrono::milliseconds) override { return true; }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override { return future; }
  c10::intrusive_ptr<c10::ivalue::Future> future;
};

Result done(const Result& work, const Tensors& results = {}) {
  work->wait();
  return c10::make_intrusive<Done>(results);
}

at::Tensor host(const at::Tensor& tensor) {
  TORCH_CHECK(tensor.is_privateuseone(), "No backend type associated with device type cpu");
  return on_host(tensor);
}

Tensors host(const Tensors& tensors) {
  Tensors found;
  for (const auto& tensor : tensors) found.push_back(host(tensor));
  return found;
}

std::vector<Tensors> host(const std::vector<Tensors>& lists) {
  std::vector<Tensors> found;
  for (const auto& tensors : lists) found.push_back(host(tensors));
  return found;
}

class Backend final : public c10d::Backend {
 public:
  explicit Backend(c10::intrusive_ptr<c10d::Backend> gloo)
      : c10d::Backend(gloo->getRank(), gloo->getSize()), gloo_(std::move(gloo)) {}

  const std::string getBackendName() const override { return "apart"; }

  Result broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override {
    auto own = host(tensors);
    return done(gloo_->broadcast(own, options), tensors);
  }
  Result allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override {
    auto own = host(tensors);
    return reduced(tensors, own, options, [&](auto& o) { return gloo_->allreduce(own, o); });
  }
  Result reduce(Tensors& tensors, const c10d::ReduceOptions& options) override {
    auto own = host(tensors);
    return reduced(tensors, own, options, [&](auto& o) { return gloo_->reduce(own, o); });
  }
  Result allgather(
      std::vector<Tensors>& out, Tensors& in, const c10d::AllgatherOptions& options) override {
    auto to = host(out);
    auto from = host(in);
    return done(gloo_->allgather(to, from, options));
  }
  Result _allgather_base(
      at::Tensor& out, at::Tensor& in, const c10d::AllgatherOptions& options) override {
    auto to = host(out), from = host(in);
    return done(gloo_->_allgather_base(to, from, options), {out});
  }
  Result allgather_into_tensor_coalesced(
      Tensors& out, Tensors& in, const c10d::AllgatherOptions& options) override {
    auto to = host(out), from = host(in);
    return done(gloo_->allgather_into_tensor_coalesced(to, from, options), out);
  }
  Result reduce_scatter(
      Tensors& out,
      std::vector<Tensors>& in,
      const c10d::ReduceScatterOptions& options) override {
    auto to = host(out);
    auto from = host(in);
    return reduced(out, to, options, [&](auto& o) { return gloo_->reduce_scatter(to, from, o); });
  }
  Result _reduce_scatter_base(
      at::Tensor& out, at::Tensor& in, const c10d::ReduceScatterOptions& options) override {
    auto to = host(out), from = host(in);
    return reduced({out}, {to}, options, [&](auto& o) {
      return gloo_->_reduce_scatter_base(to, from, o);
    });
  }
  Result alltoall_base(
      at::Tensor& out,
      at::Tensor& in,
      std::vector<int64_t>& received,
      std::vector<int64_t>& sent,
      const c10d::AllToAllOptions& options) override {
    auto to = host(out), from = host(in);
    return done(gloo_->alltoall_base(to, from, received, sent, options), {out});
  }
  Result barrier(const c10d::BarrierOptions& options) override {
    return done(gloo_->barrier(options));
  }

 private:
  // NCCL knows means, which gloo does not.
  template <class Options, class Run>
  Result reduced(const Tensors& results, const Tensors& same, Options options, Run run) {
    const bool is_mean = options.reduceOp == ReduceOp::AVG;
    if (is_mean) options.reduceOp = ReduceOp::SUM;
    run(options)->wait();
    if (is_mean)
      for (auto result : same) result.div_(getSize());
    return c10::make_intrusive<Done>(results);
  }

  c10::intrusive_ptr<c10d::Backend> gloo_;
};

}  // namespace
}  // namespace apart

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  apart::register_hooks();
  module.def("allocations", [] { return apart::allocations.load(); });
  module.def("waits_are_errors", [](bool are) { apart::waits_are_errors = are; });
  py::module_::import("torch._C._distributed_c10d");
  py::class_<apart::Backend, c10::intrusive_ptr<apart::Backend>, c10d::Backend>(module, "Backend")
      .def(py::init<c10::intrusive_ptr<c10d::Backend>>());
}
