// A device of torch's whose memory is apart from the host's as far as torch can tell. Its memory is
// the host's: operators run on it by their kernels for CPUs. It counts allocations, and can refuse
// what would have the host wait.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/SparseCsrTensorUtils.h>
#include <ATen/core/GeneratorForPrivateuseone.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/_sparse_csr_tensor_unsafe.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <set>
#include <string>

#include "apart.h"

namespace apart {

constexpr auto KIND = c10::DeviceType::PrivateUse1;
const c10::Device THE_DEVICE(KIND, 0);

std::atomic<int64_t> allocations{0};
std::atomic<bool> waits_are_errors{false};
thread_local bool is_inside = false;  // of an operator: what it does there is no step of the user's

namespace {

struct Inside {
  Inside() : before(is_inside) { is_inside = true; }
  ~Inside() { is_inside = before; }
  bool before;
};

void waits(const std::string& what) {
  TORCH_CHECK(is_inside || !waits_are_errors, "the host would wait for the device: ", what);
}

// Memory

struct DeviceMemory final : at::Allocator {
  at::DataPtr allocate(size_t bytes) override {
    allocations++;
    void* data = c10::alloc_cpu(bytes);
    return {data, data, &c10::free_cpu, THE_DEVICE};
  }
  at::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

// What of the host is pinned.
struct PinnedMemory final : at::Allocator {
  at::DataPtr allocate(size_t bytes) override {
    void* data = c10::alloc_cpu(std::max<size_t>(bytes, 1));
    std::lock_guard<std::mutex> guard(lock());
    known().insert(data);
    return {data, data, &release, c10::Device(c10::kCPU)};
  }
  static void release(void* data) {
    std::lock_guard<std::mutex> guard(lock());
    known().erase(data);
    c10::free_cpu(data);
  }
  static bool has(const void* data) {
    std::lock_guard<std::mutex> guard(lock());
    return known().count(data) > 0;
  }
  at::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
  static std::set<const void*>& known() {
    static std::set<const void*> pointers;
    return pointers;
  }
  static std::mutex& lock() {
    static std::mutex mutex;
    return mutex;
  }
};

DeviceMemory device_memory;
PinnedMemory pinned_memory;
REGISTER_ALLOCATOR(KIND, &device_memory);

// What torch asks of every device. There is one, with one stream, on which all is done at once.

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = KIND;
  c10::DeviceType type() const override { return KIND; }
  c10::Device exchangeDevice(c10::Device) const override { return THE_DEVICE; }
  c10::Device getDevice() const override { return THE_DEVICE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag)
      const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, THE_DEVICE); }
};

struct Generator final : at::CPUGeneratorImpl {
  Generator() {
    device_ = THE_DEVICE;
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  void init() const override {}
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  bool isPinnedPtr(const void* data) const override { return PinnedMemory::has(data); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static const at::Generator generator = at::make_generator<Generator>();
    return generator;
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::make_generator<Generator>();
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    at::native::resize_bytes_cpu(storage.unsafeGetStorageImpl(), bytes);
  }
};

}  // namespace

void register_hooks() { at::RegisterPrivateUse1HooksInterface(new Hooks()); }

at::Tensor on_host(const at::Tensor& tensor) {
  if (!tensor.defined() || !tensor.is_privateuseone()) return tensor;
  const auto& storage = tensor.storage();
  at::DataPtr memory(const_cast<void*>(storage.data()), at::kCPU);
  c10::Storage same(
      c10::Storage::use_byte_size_t{}, storage.nbytes(), std::move(memory), nullptr, false);
  auto found = at::empty({0}, tensor.options().device(at::kCPU));
  found.set_(same, tensor.storage_offset(), tensor.sizes(), tensor.strides());
  return found;
}

namespace {

// Operators that only torch's device can have

using Sizes = c10::SymIntArrayRef;
constexpr c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);

at::Tensor empty(
    at::IntArrayRef size,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<at::Device>,
    std::optional<bool>,
    std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(
      size, &device_memory, KEYS, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    at::IntArrayRef size,
    at::IntArrayRef stride,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<at::Device>,
    std::optional<bool>) {
  return at::detail::empty_strided_generic(
      size, stride, &device_memory, KEYS, c10::dtype_or_default(dtype));
}

at::Tensor as_strided(
    const at::Tensor& self, Sizes size, Sizes stride, std::optional<c10::SymInt> offset) {
  return at::cpu::as_strided_symint(self, size, stride, offset);
}

at::Tensor view(const at::Tensor& self, Sizes size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}

at::Tensor reshape_alias(const at::Tensor& self, Sizes size, Sizes stride) {
  return at::native::_reshape_alias(
      self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

const at::Tensor& resize_(
    const at::Tensor& self, Sizes size, std::optional<at::MemoryFormat> format) {
  return at::native::resize_(self, C10_AS_INTARRAYREF_SLOW(size), format);
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return at::native::set_tensor_(self, source);
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source) {
  return at::native::set_(self, source);
}

at::Tensor& set_storage_offset(
    at::Tensor& self,
    at::Storage source,
    int64_t offset,
    at::IntArrayRef size,
    at::IntArrayRef stride) {
  return at::cpu::set_(self, source, offset, size, stride);
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& to, bool non_blocking) {
  if (self.device() != to.device()) {
    const auto& host = self.is_cpu() ? self : to;
    if (!non_blocking || !host.is_pinned())
      waits(self.is_cpu() ? "a copy from the host" : "a copy to the host");
  }
  on_host(to).copy_(on_host(self));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& to) {
  at::native::resize_(to, self.sizes(), std::nullopt);
  on_host(to).copy_(on_host(self));
  return to;
}

at::Scalar local_scalar_dense(const at::Tensor& self) {
  waits("a number is read");
  return on_host(self).item();
}

// A CSR matrix is no tensor of the device's own kind: its product has a key of its own.
at::Tensor matrix_on_host(const at::Tensor& tensor) {
  if (tensor.layout() != at::kSparseCsr) return on_host(tensor);
  const auto* matrix = at::sparse_csr::get_sparse_csr_impl(tensor);
  return at::_sparse_csr_tensor_unsafe(
      on_host(matrix->compressed_indices()),
      on_host(matrix->plain_indices()),
      on_host(matrix->values()),
      tensor.sizes(),
      tensor.options().device(at::kCPU));
}

at::Tensor& csr_addmm_out(
    const at::Tensor& self,
    const at::Tensor& first,
    const at::Tensor& second,
    const at::Scalar& beta,
    const at::Scalar& alpha,
    at::Tensor& out) {
  Inside inside;
  auto result = on_host(out);
  at::addmm_out(
      result, on_host(self), matrix_on_host(first), matrix_on_host(second), beta, alpha);
  return out;
}

// All others run on the host. Their tensors must be together, as on any device.

const std::set<std::string> INDEXING = {
    "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"};
// The size of what they give is known only when they are done.
const std::set<std::string> OF_UNKNOWN_SIZE = {
    "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::equal"};

template <class Visit>
void each_tensor(const c10::IValue& value, Visit visit) {
  if (value.isTensor()) {
    visit(value.toTensor());
  } else if (value.isTensorList()) {
    for (const at::Tensor& tensor : value.toTensorVector()) visit(tensor);
  } else if (value.isOptionalTensorList()) {
    for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorList())
      if (tensor) visit(*tensor);
  }
}

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& name = op.schema().operator_name().name;
  const auto arguments = torch::jit::last(*stack, op.schema().arguments().size());
  if (INDEXING.count(name)) {  // indices may be on the host, and then they travel
    for (const auto& value : arguments)
      if (value.isOptionalTensorList())
        each_tensor(value, [&](const at::Tensor& index) {
          if (index.defined() && (index.is_cpu() || index.scalar_type() == at::kBool))
            waits("indices are on the host, or a mask");
        });
  } else {
    for (const auto& value : arguments)
      each_tensor(value, [&](const at::Tensor& tensor) {
        TORCH_CHECK(
            !tensor.defined() || tensor.is_privateuseone() || tensor.dim() == 0,
            "Expected all tensors to be on the same device, but ", name, " got one on ",
            tensor.device());
      });
  }
  if (OF_UNKNOWN_SIZE.count(name)) waits(name);
  Inside inside;
  at::native::cpu_fallback(op, stack);
}

}  // namespace
}  // namespace apart

namespace at::detail {
C10_REGISTER_GUARD_IMPL(PrivateUse1, apart::Guard);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", apart::empty);
  library.impl("empty_strided", apart::empty_strided);
  library.impl("as_strided", apart::as_strided);
  library.impl("view", apart::view);
  library.impl("_reshape_alias", apart::reshape_alias);
  library.impl("resize_", apart::resize_);
  library.impl("set_.source_Tensor", apart::set_tensor);
  library.impl("set_.source_Storage", apart::set_storage);
  library.impl("set_.source_Storage_storage_offset", apart::set_storage_offset);
  library.impl("_copy_from", apart::copy_from);
  library.impl("_copy_from_and_resize", apart::copy_from_and_resize);
  library.impl("_local_scalar_dense", apart::local_scalar_dense);
}

TORCH_LIBRARY_IMPL(aten, SparseCsrPrivateUse1, library) {
  library.impl("addmm.out", apart::csr_addmm_out);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&apart::run_on_host>());
}
