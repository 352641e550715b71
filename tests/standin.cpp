// A device of the computer's own memory, for code that is to run on an accelerator to be run where there is none.
//
// What lies on it is out of the CPU's reach, and it refuses what MPS refuses: float64, and operators whose tensors lie
// on both sides. It counts the bytes of its tensors, runs out of them, and remembers the operators that were asked of
// it. The CPU computes them.

#include <ATen/EmptyTensor.h>
#include <ATen/Operators.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/_reshape_alias_cpu_dispatch.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/view_cpu_dispatch.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

constexpr auto KIND = c10::DeviceType::PrivateUse1;
constexpr c10::DeviceIndex COUNT = 2;  // of these devices: a process uses one of them, and counts what it takes there

std::mutex lock;
int64_t taken = 0, most = 0, room = int64_t(64) << 30;
std::unordered_map<void*, int64_t> sizes;
std::set<std::string> asked;
thread_local c10::DeviceIndex current = -1;
c10::DeviceIndex chosen = 0;  // for threads that have not chosen one

c10::Device here() { return c10::Device(KIND, current < 0 ? chosen : current); }

void release(void* pointer) {
  if (pointer == nullptr) return;
  std::lock_guard<std::mutex> guard(lock);
  taken -= sizes.at(pointer);
  sizes.erase(pointer);
  std::free(pointer);
}

struct Memory final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t nbytes) override {
    if (nbytes == 0) return {nullptr, nullptr, &release, here()};
    std::lock_guard<std::mutex> guard(lock);
    int64_t wanted = taken + static_cast<int64_t>(nbytes);
    TORCH_CHECK_WITH(OutOfMemoryError, wanted <= room, "the stand-in has ", room, " bytes, and not ", wanted);
    void* pointer = std::aligned_alloc(64, (nbytes + 63) / 64 * 64);
    sizes[pointer] = nbytes;
    taken = wanted;
    most = std::max(most, taken);
    return {pointer, pointer, &release, here()};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t count) const override { std::memcpy(to, from, count); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex) override { most = taken; }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex) override { return {room - taken, room}; }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override {
    c10::CachingDeviceAllocator::DeviceStats stats;
    for (auto* bytes : {&stats.allocated_bytes, &stats.reserved_bytes}) {
      auto& all = (*bytes)[static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE)];
      all.current = taken;
      all.peak = most;
    }
    return stats;
  }
};

Memory memory;
REGISTER_ALLOCATOR(KIND, &memory);

// Nobody ever waits: whatever was asked of it is done.
struct Guard final : c10::impl::NoOpDeviceGuardImpl<KIND> {
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, here()); }
  c10::Device exchangeDevice(c10::Device device) const override {
    auto before = here();
    setDevice(device);
    return before;
  }
  c10::Device getDevice() const override { return here(); }
  void setDevice(c10::Device device) const override { uncheckedSetDevice(device); }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() >= 0) current = chosen = device.index();
  }
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return COUNT; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isAvailable() const override { return true; }
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return COUNT; }
  c10::DeviceIndex getCurrentDevice() const override { return here().index(); }
  bool isPinnedPtr(const void*) const override { return false; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t nbytes) const override {
    auto bytes = memory.allocate(nbytes);
    if (auto count = std::min(nbytes, storage.nbytes())) std::memcpy(bytes.mutable_get(), storage.data(), count);
    storage.set_data_ptr_noswap(std::move(bytes));
    storage.set_nbytes(nbytes);
  }
};

Hooks hooks;
const bool registered = (at::RegisterPrivateUse1HooksInterface(&hooks), true);

using Size = c10::SymIntArrayRef;
using Type = std::optional<c10::ScalarType>;
using Layout = std::optional<c10::Layout>;
using Device = std::optional<c10::Device>;
using Format = std::optional<c10::MemoryFormat>;
const c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1), CPU_KEYS(c10::DispatchKey::CPU);

c10::ScalarType checked(Type asked_for) {
  auto type = c10::dtype_or_default(asked_for);
  TORCH_CHECK_TYPE(type != at::kDouble && type != at::kComplexDouble, "the stand-in has no float64, as MPS has none");
  return type;
}

at::Tensor empty(Size size, Type type, Layout, Device, std::optional<bool>, Format format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &memory, KEYS, checked(type), format);
}

at::Tensor empty_strided(Size size, Size stride, Type type, Layout, Device, std::optional<bool>) {
  auto sizes = C10_AS_INTARRAYREF_SLOW(size), strides = C10_AS_INTARRAYREF_SLOW(stride);
  return at::detail::empty_strided_generic(sizes, strides, &memory, KEYS, checked(type));
}

// The same bytes as a tensor of the CPU, which isn't to outlive `self`.
at::Tensor on_host(const at::Tensor& self) {
  if (!self.is_privateuseone()) return self;
  c10::DataPtr bytes(self.storage().mutable_data(), c10::Device(at::kCPU));
  c10::Storage storage({}, self.storage().nbytes(), std::move(bytes), c10::GetAllocator(c10::kCPU), true);
  auto found = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), CPU_KEYS, self.dtype());
  found.unsafeGetTensorImpl()->set_sizes_and_strides(self.sizes(), self.strides(), self.storage_offset());
  return found;
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& to, bool) {
  if (self.numel() > 0) on_host(to).copy_(on_host(self));
  return to;
}

const at::Tensor& resize(const at::Tensor& self, Size size, Format) {
  auto* tensor = self.unsafeGetTensorImpl();
  tensor->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(size));
  size_t needed = (tensor->storage_offset() + tensor->numel()) * tensor->itemsize();
  if (needed > tensor->storage().nbytes()) hooks.resizePrivateUse1Bytes(tensor->storage(), needed);
  return self;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& to) {
  to.resize_(self.sizes());
  return copy_from(self, to, false);
}

at::Scalar local_scalar_dense(const at::Tensor& self) { return on_host(self).item(); }

void remember(const std::string& name) {
  std::lock_guard<std::mutex> guard(lock);
  asked.insert(name);
}

at::Tensor convolution(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                       Size stride, Size padding, Size dilation, bool transposed, Size output_padding,
                       c10::SymInt groups) {
  remember("aten::convolution");
  auto host_bias = bias && bias->defined() ? std::optional<at::Tensor>(bias->cpu()) : std::nullopt;
  return at::_ops::convolution::call(x.cpu(), weight.cpu(), host_bias, stride, padding, dilation, transposed,
                                     output_padding, groups)
      .to(x.device());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, Size stride, Size padding,
    Size dilation, bool transposed, Size output_padding, c10::SymInt groups, std::array<bool, 3> wanted) {
  remember("aten::convolution_backward");
  auto bias = wanted[2] ? at::OptionalSymIntArrayRef(std::vector<c10::SymInt>{grad.sym_size(1)}) : std::nullopt;
  auto [dx, dweight, dbias] = at::_ops::convolution_backward::call(
      grad.cpu(), x.cpu(), weight.cpu(), bias, stride, padding, dilation, transposed, output_padding, groups, wanted);
  auto back = [&](const at::Tensor& found) { return found.defined() ? found.to(x.device()) : found; };
  return {back(dx), back(dweight), back(dbias)};
}

// These take indices that lie on the CPU too, on any device.
const std::set<std::string> MIXED = {"aten::index.Tensor", "aten::index.Tensor_out", "aten::_index_put_impl_"};

// The CPU writes where the device's tensors lie; what is new comes to lie there too.
void by_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  auto name = toString(op.operator_name());
  const auto& schema = op.schema();
  remember(name);
  const size_t count = schema.arguments().size(), start = stack->size() - count;
  const torch::jit::Stack given(stack->begin() + start, stack->end());
  bool on_device = false, on_cpu = false;
  std::optional<c10::Device> device;
  auto look = [&](const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (tensor.is_privateuseone()) on_device = true, device = tensor.device();
    if (tensor.is_cpu() && tensor.dim() > 0) on_cpu = true;
    return on_host(tensor);
  };
  for (size_t i = 0; i < count; ++i) {
    c10::IValue& argument = (*stack)[start + i];
    if (argument.isTensor()) {
      argument = look(argument.toTensor());
    } else if (argument.isTensorList()) {
      std::vector<at::Tensor> found;
      for (const at::Tensor& tensor : given[i].toTensorVector()) found.push_back(look(tensor));
      argument = c10::List<at::Tensor>(found);
    } else if (argument.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> found;
      for (std::optional<at::Tensor> tensor : given[i].toOptionalTensorList()) {
        found.push_back(tensor ? std::optional<at::Tensor>(look(*tensor)) : std::nullopt);
      }
      argument = found;
    } else if (argument.isDevice()) {
      device = argument.toDevice();
      argument = c10::Device(at::kCPU);
    }
  }
  TORCH_CHECK(!(on_device && on_cpu) || MIXED.count(name), name, " has tensors on the stand-in and on the CPU");
  const torch::jit::Stack lent(stack->begin() + start, stack->end());
  op.redispatchBoxed(CPU_KEYS, stack);
  for (size_t j = 0; j < count; ++j) {  // what the CPU has made larger lies elsewhere now
    if (!given[j].isTensor() || !given[j].toTensor().defined()) continue;
    const at::Tensor &mine = given[j].toTensor(), &theirs = lent[j].toTensor();
    if (mine.sizes() != theirs.sizes()) mine.resize_(theirs.sizes()).copy_(theirs);
  }
  const size_t first = stack->size() - schema.returns().size();
  auto back = [&](const at::Tensor& tensor) {
    return tensor.defined() ? tensor.to(device.value_or(here())) : tensor;
  };
  for (size_t i = 0; i < schema.returns().size(); ++i) {
    c10::IValue& result = (*stack)[first + i];
    if (const auto* alias = schema.returns()[i].alias_info()) {
      TORCH_CHECK(alias->isWrite(), name, " gives a view, which the stand-in can't");
      for (size_t j = 0; j < count; ++j) {
        const auto* written = schema.arguments()[j].alias_info();
        if (written != nullptr && *written == *alias) result = given[j];
      }
    } else if (result.isTensor()) {
      result = back(result.toTensor());
    } else if (result.isTensorList()) {
      std::vector<at::Tensor> found;
      for (const at::Tensor& tensor : result.toTensorVector()) found.push_back(back(tensor));
      result = c10::List<at::Tensor>(found);
    }
  }
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&by_the_cpu>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("_copy_from", &copy_from);
  library.impl("_copy_from_and_resize", &copy_from_and_resize);
  library.impl("resize_", &resize);
  library.impl("_local_scalar_dense", &local_scalar_dense);
  library.impl("as_strided", &at::cpu::as_strided_symint);
  library.impl("view", &at::cpu::view_symint);
  library.impl("_reshape_alias", &at::cpu::_reshape_alias_symint);
  library.impl("convolution_overrideable", &convolution);
  library.impl("convolution_backward_overrideable", &convolution_backward);
}

// Autocast takes the same operators in a lower precision as it does on MPS and CUDA.
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, library) { library.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
#define LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
  AT_FORALL_LOWER_PRECISION_FP(LOWER)
#define FP32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
  AT_FORALL_FP32(FP32)
}

TORCH_LIBRARY(standin, library) {
  library.def("limit(int nbytes) -> ()", [](int64_t nbytes) { room = nbytes; });
  library.def("asked() -> str[]", [] { return std::vector<std::string>(asked.begin(), asked.end()); });
}

}  // namespace
