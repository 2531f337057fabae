// Two pretend GPUs for a CPU build of torch: tensors say cuda:0 and cuda:1, lie in host memory, and are computed by the
// CPU's kernels. tests/pretend_cuda/__init__.py says what this is for and what it cannot show; this page says how it
// works.
//
// torch finds the code for a device in tables, and a CPU build leaves those for CUDA empty. Whoever fills them is CUDA:
//
// - a guard (`Guard`) knows the current device and stream of a thread;
// - an allocator (`DeviceMemory`) gives out host memory that is marked as a device's;
// - the hooks (`CUDAHooks`) tell torch that CUDA is there, and give out page-locked memory (`PinnedMemory`);
// - a dispatch table holds an operator's kernel for each kind of device. A handful of operators are written here: those
//   that allocate, copy, resize or view. All others come to `compute_on_cpu`, torch's "boxed fallback" for operators
//   without a kernel: the arguments are re-labelled as CPU tensors over the same memory, the CPU's kernel computes, and
//   the results are re-labelled as the device's.
//
// torch asks for the hooks once, as it is imported: this library must be loaded before (see site/sitecustomize.py).
//
// What is stricter than the CPU is what CUDA is stricter in:
//
// - Fresh memory is full of 0xFF, which is nan in every floating-point type.
// - An operator with tensors on different devices is refused, but for scalars (0-dimensional CPU tensors) and indices.
// - Every wait of the host for a device is counted, and told to a Python function that can look at the stack.
// - A non-blocking copy from a device to page-locked memory arrives late: the target is full of 0xFF until the host has
//   waited for the device. A program that reads too early reads nan.
// - A device has a limit of memory, and a text for the error beyond the limit.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/NativeFunctions.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/distributed/c10d/reducer_timer.hpp>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <atomic>
#include <map>
#include <mutex>

using at::Tensor;
using c10::DataPtr;
using c10::Device;
using c10::DeviceIndex;
using c10::DispatchKey;
using c10::IValue;
using c10::Stream;

namespace {

constexpr DeviceIndex kDevices = 2;
constexpr int kGarbage = 0xFF;
const c10::DispatchKeySet kCudaKey(DispatchKey::CUDA);

thread_local DeviceIndex device_now = 0;
thread_local c10::StreamId stream_now[kDevices] = {0, 0};

Device cuda_device(DeviceIndex index) {
  return Device(c10::kCUDA, index);
}

// ---- What Python may want to know ------------------------------------------------------------------------------------

std::atomic<int64_t> waits{0};
// Called with (operator, device, stream): for each wait of the host, and for every operator. Never freed, since they
// would be when Python has gone.
py::object* on_wait = nullptr;
py::object* on_operation = nullptr;

void tell(const py::object* listener, const std::string& operation, DeviceIndex device) {
  if (listener && Py_IsInitialized()) {
    py::gil_scoped_acquire held;
    (*listener)(operation, static_cast<int>(device), stream_now[device]);
  }
}

std::atomic<bool> recording{false};

void note_operation(const std::string& operation, DeviceIndex device) {
  if (recording) {
    tell(on_operation, operation, device);
  }
}

// ---- Copies to the host that have been asked for and have not arrived ------------------------------------------------

struct LateCopy {
  Tensor target;  // in page-locked host memory
  Tensor value;   // a copy of the source, as of the call
};
std::mutex late_lock;
std::vector<LateCopy> late_copies;

void deliver_late_copies() {
  std::vector<LateCopy> due;
  {
    std::lock_guard<std::mutex> guard(late_lock);
    due.swap(late_copies);
  }
  for (auto& copy : due) {
    copy.target.copy_(copy.value);
  }
}

// The host waits for a device: copies arrive, the wait is counted, and Python hears of it.
void host_waits(const std::string& operation, DeviceIndex device) {
  deliver_late_copies();
  ++waits;
  tell(on_wait, operation, device);
}

// ---- Devices and streams ---------------------------------------------------------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = c10::kCUDA;

  c10::DeviceType type() const override {
    return c10::kCUDA;
  }
  Device exchangeDevice(Device device) const override {
    const auto before = device_now;
    uncheckedSetDevice(device);
    return cuda_device(before);
  }
  Device getDevice() const override {
    return cuda_device(device_now);
  }
  void setDevice(Device device) const override {
    uncheckedSetDevice(device);
  }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.has_index()) {
      device_now = device.index();
    }
  }
  Stream getStream(Device device) const override {
    return Stream(Stream::UNSAFE, device, stream_now[device.index()]);
  }
  Stream getDefaultStream(Device device) const override {
    return Stream(Stream::DEFAULT, device);
  }
  Stream getNewStream(Device device, int) const override {
    static std::atomic<c10::StreamId> made{1000};
    return Stream(Stream::UNSAFE, device, ++made);
  }
  Stream getStreamFromGlobalPool(Device device, bool) const override {
    return getNewStream(device, 0);
  }
  Stream exchangeStream(Stream stream) const override {
    const auto device = stream.device_index();
    const Stream before(Stream::UNSAFE, stream.device(), stream_now[device]);
    stream_now[device] = stream.id();
    return before;
  }
  DeviceIndex deviceCount() const noexcept override {
    return kDevices;
  }
  // Everything is computed at once, so events and streams have nothing to wait for
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override {
    return true;
  }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override {
    return true;
  }
  void synchronizeStream(const Stream& stream) const override {
    host_waits("synchronize", stream.device_index());
  }
  void synchronizeEvent(void*) const override {
    host_waits("synchronize", device_now);
  }
  void synchronizeDevice(const DeviceIndex device) const override {
    host_waits("synchronize", device);
  }
  void recordDataPtrOnStream(const DataPtr&, const Stream&) const override {}
};

// ---- Memory ----------------------------------------------------------------------------------------------------------

struct Memory {
  int64_t used = 0;
  int64_t peak = 0;
  int64_t limit = int64_t{15} << 30;
  std::string text;  // of the error beyond the limit; empty: torch's own OutOfMemoryError
};
std::mutex memory_lock;
Memory memory[kDevices];

void take_memory(DeviceIndex device, int64_t bytes) {
  std::lock_guard<std::mutex> guard(memory_lock);
  auto& here = memory[device];
  if (here.used + bytes > here.limit) {
    TORCH_CHECK(here.text.empty(), here.text);
    TORCH_CHECK_WITH(
        OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", bytes, " bytes. GPU ",
        static_cast<int>(device), " has a total capacity of ", here.limit, " bytes of which ", here.limit - here.used,
        " bytes is free. (a pretend GPU)");
  }
  here.used += bytes;
  here.peak = std::max(here.peak, here.used);
}

void return_memory(DeviceIndex device, int64_t bytes) {
  std::lock_guard<std::mutex> guard(memory_lock);
  memory[device].used -= bytes;
}

// A piece of a device's memory: bytes of its own, or a CPU tensor that a kernel has made.
struct Block {
  DeviceIndex device;
  int64_t bytes;
  void* own;
  Tensor made;
};

void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  return_memory(block->device, block->bytes);
  std::free(block->own);
  delete block;
}

struct DeviceMemory final : c10::Allocator {
  DataPtr allocate(size_t bytes) override {
    return allocate_on(device_now, bytes);
  }
  DataPtr allocate_on(DeviceIndex device, size_t bytes) {
    if (bytes == 0) {
      return {nullptr, cuda_device(device)};
    }
    take_memory(device, bytes);
    void* data = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    std::memset(data, kGarbage, bytes);
    auto* block = new Block{device, static_cast<int64_t>(bytes), data, Tensor()};
    return {data, block, &free_block, cuda_device(device)};
  }
  void copy_data(void* target, const void* source, size_t bytes) const override {
    std::memcpy(target, source, bytes);
  }
};
DeviceMemory device_memory;

std::mutex pinned_lock;
std::map<const char*, size_t> pinned;  // where page-locked memory begins, and its length
int64_t pinned_limit = int64_t{1} << 40;

void free_pinned(void* data) {
  {
    std::lock_guard<std::mutex> guard(pinned_lock);
    pinned.erase(static_cast<const char*>(data));
  }
  std::free(data);
}

struct PinnedMemory final : c10::Allocator {
  DataPtr allocate(size_t bytes) override {
    // torch's allocator of page-locked memory rounds up to a power of two (CachingHostAllocator.h)
    size_t rounded = 1;
    while (rounded < bytes) {
      rounded *= 2;
    }
    std::lock_guard<std::mutex> guard(pinned_lock);
    int64_t held = 0;
    for (const auto& each : pinned) {
      held += each.second;
    }
    TORCH_CHECK(held + static_cast<int64_t>(rounded) <= pinned_limit, "CUDA error: out of memory");
    void* data = std::aligned_alloc(64, std::max<size_t>(rounded, 64));
    pinned[static_cast<const char*>(data)] = rounded;
    return {data, data, &free_pinned, Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return &free_pinned;
  }
  void copy_data(void* target, const void* source, size_t bytes) const override {
    std::memcpy(target, source, bytes);
  }
};
PinnedMemory pinned_memory;

bool is_pinned(const void* pointer) {
  const auto* data = static_cast<const char*>(pointer);
  std::lock_guard<std::mutex> guard(pinned_lock);
  auto after = pinned.upper_bound(data);
  return after != pinned.begin() && data < std::prev(after)->first + std::prev(after)->second;
}

// ---- The same memory under another label -----------------------------------------------------------------------------

// A CPU tensor over a device tensor's memory, which it keeps alive.
Tensor as_cpu(const Tensor& tensor) {
  if (!tensor.defined() || !tensor.is_cuda()) {
    return tensor;
  }
  auto options = at::TensorOptions().dtype(tensor.dtype()).device(c10::kCPU);
  Tensor found = at::from_blob(
      const_cast<void*>(tensor.const_data_ptr()), tensor.sizes(), tensor.strides(),
      [storage = tensor.storage()](void*) {}, options);
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) {
    found.unsafeGetTensorImpl()->set_wrapped_number(true);
  }
  return found;
}

// A device tensor over a CPU tensor's memory, which it keeps alive and which counts as the device's from now on.
Tensor as_cuda(const Tensor& made, DeviceIndex device) {
  if (!made.defined() || made.is_cuda()) {
    return made;
  }
  const auto bytes = static_cast<int64_t>(made.storage().nbytes());
  take_memory(device, bytes);
  auto* block = new Block{device, bytes, nullptr, made};
  DataPtr data(made.storage().mutable_data(), block, &free_block, cuda_device(device));
  c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, std::move(data), &device_memory, true);
  Tensor found = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), kCudaKey, made.dtype());
  found.unsafeGetTensorImpl()->set_sizes_and_strides(made.sizes(), made.strides(), made.storage_offset());
  return found;
}

// ---- Operators with code of their own --------------------------------------------------------------------------------

struct OnDevice {  // makes a device the current one until the end of the block
  DeviceIndex before = device_now;
  explicit OnDevice(const std::optional<Device>& device) {
    if (device && device->has_index()) {
      device_now = device->index();
    }
  }
  ~OnDevice() {
    device_now = before;
  }
};

using Type = std::optional<c10::ScalarType>;
using Shape = c10::SymIntArrayRef;

Tensor empty(
    at::IntArrayRef size, Type type, std::optional<c10::Layout>, std::optional<Device> device, std::optional<bool>,
    std::optional<c10::MemoryFormat> format) {
  OnDevice on(device);
  return at::detail::empty_generic(size, &device_memory, kCudaKey, c10::dtype_or_default(type), format);
}

Tensor empty_strided(
    at::IntArrayRef size, at::IntArrayRef stride, Type type, std::optional<c10::Layout>, std::optional<Device> device,
    std::optional<bool>) {
  OnDevice on(device);
  return at::detail::empty_strided_generic(size, stride, &device_memory, kCudaKey, c10::dtype_or_default(type));
}

// copy_ within a device, between devices, to a device and from a device
Tensor& copy(Tensor& target, const Tensor& source, bool non_blocking) {
  const auto device = target.is_cuda() ? target.device().index() : source.device().index();
  note_operation("copy_", device);
  if (target.is_cuda() && source.is_cuda()) {
    as_cpu(target).copy_(as_cpu(source));
    return target;
  }
  const Tensor& host = target.is_cuda() ? source : target;
  const bool late = non_blocking && target.is_cpu() && is_pinned(host.storage().data());
  if (late) {
    std::lock_guard<std::mutex> guard(late_lock);
    late_copies.push_back({target, as_cpu(source).to(target.scalar_type(), false, true)});
    Tensor bytes = at::empty_like(target);
    std::memset(bytes.data_ptr(), kGarbage, bytes.nbytes());
    target.copy_(bytes);
    return target;
  }
  if (non_blocking) {
    deliver_late_copies();  // the source may be the target of an earlier copy, which the device finishes first
  } else {
    host_waits(target.is_cuda() ? "copy_ to a GPU" : "copy_ to the CPU", device);
  }
  as_cpu(target).copy_(as_cpu(source));
  return target;
}

at::Scalar item(const Tensor& tensor) {
  host_waits("item", tensor.device().index());
  return at::_local_scalar_dense(as_cpu(tensor));
}

void resize_storage(const c10::Storage& storage, size_t bytes) {
  auto* impl = storage.unsafeGetStorageImpl();
  const auto device = impl->device().index();
  DataPtr data = device_memory.allocate_on(device, bytes);
  if (bytes && impl->nbytes()) {
    std::memcpy(data.get(), impl->data(), std::min(bytes, impl->nbytes()));
  }
  impl->set_data_ptr_noswap(std::move(data));
  impl->set_nbytes(bytes);
}

const Tensor& resize_tensor(const Tensor& tensor, at::IntArrayRef size, std::optional<c10::MemoryFormat>) {
  auto* impl = tensor.unsafeGetTensorImpl();
  if (tensor.sizes() != size) {
    const auto needed = (c10::multiply_integers(size) + impl->storage_offset()) * impl->itemsize();
    if (impl->storage().nbytes() < needed) {
      resize_storage(impl->storage(), needed);
    }
    impl->set_sizes_contiguous(size);
  }
  return tensor;
}

Tensor as_strided(const Tensor& tensor, Shape size, Shape stride, std::optional<c10::SymInt> offset) {
  std::optional<int64_t> start;
  if (offset) {
    start = offset->expect_int();
  }
  return at::native::as_strided_tensorimpl(
      tensor, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), start);
}

Tensor view(const Tensor& tensor, Shape size) {
  return at::native::view(tensor, C10_AS_INTARRAYREF_SLOW(size));
}

Tensor reshape_alias(const Tensor& tensor, Shape size, Shape stride) {
  return at::native::_reshape_alias(tensor, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

Tensor unfold(const Tensor& tensor, int64_t dimension, int64_t size, int64_t step) {
  return at::native::unfold(tensor, dimension, size, step);
}

Tensor& set_storage(Tensor& tensor, c10::Storage storage) {
  return at::native::set_(tensor, storage);
}

// torch.save and torch.load move storages as tensors over them
Tensor& set_storage_part(
    Tensor& tensor, c10::Storage storage, int64_t offset, at::IntArrayRef size, at::IntArrayRef strides) {
  return at::native::set_storage_cpu_(tensor, storage, offset, size, strides);
}

void record_stream(Tensor&, Stream) {}

// ---- All other operators ---------------------------------------------------------------------------------------------

bool has_word(const std::string& text, std::initializer_list<const char*> words) {
  return std::any_of(words.begin(), words.end(), [&](auto* word) { return text.find(word) != std::string::npos; });
}

// The device of an operator: that of its tensors, which must be on one.
struct Place {
  const std::string& operation;
  DeviceIndex device = -1;
  bool by_dimensions = false;  // found from a tensor that is no scalar
  bool boolean_index = false;

  void see(const Tensor& tensor) {
    if (!tensor.defined()) {
      return;
    }
    if (tensor.is_cuda()) {
      const auto index = tensor.device().index();
      const bool counts = tensor.dim() > 0;
      TORCH_CHECK(
          !(by_dimensions && counts) || index == device,
          "Expected all tensors to be on the same device, but found at least two devices, cuda:",
          static_cast<int>(device), " and cuda:", static_cast<int>(index), "! (", operation, ")");
      if (device < 0 || (counts && !by_dimensions)) {
        device = index;
        by_dimensions = counts;
      }
    } else if (tensor.is_cpu() && tensor.dim() > 0) {
      TORCH_CHECK(
          has_word(operation, {"aten::index", "set_"}),
          "Expected all tensors to be on the same device, but found at least two devices, cuda and cpu! (", operation,
          ")");
    }
  }
  void see_index(const Tensor& tensor) {
    see(tensor);
    const bool booleans =
        tensor.defined() && (tensor.scalar_type() == c10::kBool || tensor.scalar_type() == c10::kByte);
    boolean_index = boolean_index || booleans;
  }
};

// Their results have a size that only the device knows
bool has_size_of_values(const std::string& operation) {
  return has_word(operation, {"aten::nonzero", "aten::masked_select", "unique", "aten::bincount"}) ||
      operation == "aten::repeat_interleave";
}

void compute_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& arguments = schema.arguments();
  const auto first = stack->size() - arguments.size();
  const std::vector<IValue> given(stack->begin() + first, stack->end());
  Place place{schema.name()};
  for (size_t i = 0; i < arguments.size(); i++) {
    IValue& value = (*stack)[first + i];
    if (value.isTensor()) {
      const Tensor tensor = value.toTensor();
      place.see(tensor);
      const auto* alias = arguments[i].alias_info();
      const bool to_fill =
          alias && alias->isWrite() && tensor.defined() && tensor.is_cuda() && tensor.numel() == 0;
      // an empty out= is resized by the kernel, and memory that is not its own cannot be
      value = to_fill ? at::empty(tensor.sizes(), tensor.options().device(c10::kCPU)) : as_cpu(tensor);
    } else if (value.isTensorList()) {
      c10::List<Tensor> tensors;
      for (const Tensor& tensor : value.toTensorVector()) {
        place.see(tensor);
        tensors.push_back(as_cpu(tensor));
      }
      value = tensors;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> tensors;
      for (const auto& tensor : value.toOptionalTensorVector()) {
        if (tensor) {
          place.see_index(*tensor);
        }
        tensors.push_back(tensor ? std::optional<Tensor>(as_cpu(*tensor)) : std::nullopt);
      }
      value = tensors;
    } else if (value.isDevice() && value.toDevice().is_cuda()) {
      if (value.toDevice().has_index()) {
        place.device = value.toDevice().index();
      }
      value = Device(c10::kCPU);
    } else if (value.isGenerator()) {
      value = IValue();  // the CPU's own
    }
  }
  const auto device = place.device < 0 ? device_now : place.device;
  note_operation(schema.name(), device);
  if (has_size_of_values(schema.name()) || place.boolean_index) {
    host_waits(schema.name(), device);
  }
  const std::vector<IValue> used(stack->begin() + first, stack->end());
  op.callBoxed(stack);
  for (size_t i = 0; i < arguments.size(); i++) {  // an out= that the kernel has resized
    if (given[i].isTensor() && given[i].toTensor().defined() && given[i].toTensor().is_cuda()) {
      const Tensor before = given[i].toTensor(), after = used[i].toTensor();
      if (before.const_data_ptr() != after.const_data_ptr() || before.sizes() != after.sizes()) {
        resize_tensor(before, after.sizes(), std::nullopt);
        as_cpu(before).copy_(after);
      }
    }
  }
  const auto& returns = schema.returns();
  for (size_t r = 0; r < returns.size(); r++) {
    IValue& value = (*stack)[stack->size() - returns.size() + r];
    const auto* written = returns[r].alias_info();
    bool is_argument = false;
    for (size_t i = 0; written && written->isWrite() && i < arguments.size() && !is_argument; i++) {
      const auto* alias = arguments[i].alias_info();
      is_argument = alias && given[i].isTensor() && alias->beforeSets() == written->beforeSets();
      if (is_argument) {
        value = given[i];
      }
    }
    if (is_argument) {
      continue;
    }
    if (value.isTensor()) {
      value = as_cuda(value.toTensor(), device);
    } else if (value.isTensorList()) {
      c10::List<Tensor> tensors;
      for (const Tensor& tensor : value.toTensorVector()) {
        tensors.push_back(as_cuda(tensor, device));
      }
      value = tensors;
    }
  }
}

// ---- What torch asks CUDA itself -------------------------------------------------------------------------------------

struct CUDAHooks : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override {
    return true;
  }
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return true;
  }
  bool hasPrimaryContext(DeviceIndex) const override {
    return true;
  }
  DeviceIndex deviceCount() const override {
    return kDevices;
  }
  DeviceIndex getCurrentDevice() const override {
    return device_now;
  }
  void setCurrentDevice(DeviceIndex device) const override {
    device_now = device;
  }
  DeviceIndex exchangeDevice(DeviceIndex device) const override {
    return std::exchange(device_now, device);
  }
  bool isPinnedPtr(const void* data) const override {
    return is_pinned(data);
  }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    return &pinned_memory;
  }
};

}  // namespace

C10_REGISTER_GUARD_IMPL(CUDA, Guard)
namespace c10 {
REGISTER_ALLOCATOR(c10::kCUDA, &device_memory)
}
namespace at {
using CUDAHooks = ::CUDAHooks;  // torch asks for a class of this name
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at

namespace c10d {
// DistributedDataParallel asks for a timer by the kind of device, and times its first steps
struct PretendTimer : Timer {
  explicit PretendTimer(c10::Device) {}
  std::optional<int64_t> measureDifference(Event start, Event end) override {
    const auto from = getTimeRef(start), to = getTimeRef(end);
    const bool known = from != kUnsetTime && to != kUnsetTime && to >= from;
    return known ? std::optional<int64_t>(to - from) : std::nullopt;
  }
};
C10_REGISTER_TYPED_CLASS(TimerRegistry, c10::kCUDA, PretendTimer)
}  // namespace c10d

TORCH_LIBRARY_IMPL(_, CUDA, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&compute_on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("copy_", copy);
  library.impl("_local_scalar_dense", item);
  library.impl("resize_", resize_tensor);
  library.impl("as_strided", as_strided);
  library.impl("view", view);
  library.impl("_reshape_alias", reshape_alias);
  library.impl("unfold", unfold);
  library.impl("set_.source_Storage", set_storage);
  library.impl("set_.source_Storage_storage_offset", set_storage_part);
  library.impl("record_stream", record_stream);
  // torch's own code for all devices asks for CUDA's kernels here
  library.impl("convolution", torch::CppFunction::makeFromBoxedFunction<&compute_on_cpu>());
  library.impl("convolution_backward", torch::CppFunction::makeFromBoxedFunction<&compute_on_cpu>());
}

PYBIND11_MODULE(pretend_cuda_library, module) {
  module.def("waits", [] { return waits.load(); });
  module.def("on_wait", [](py::object listener) { on_wait = new py::object(std::move(listener)); });
  module.def("on_operation", [](py::object listener) {
    recording = !listener.is_none();
    on_operation = new py::object(std::move(listener));
  });
  module.def("host_waits", [](const std::string& operation, int device) {
    py::gil_scoped_release released;
    host_waits(operation, device);
  });
  module.def("current_device", [] { return static_cast<int>(device_now); });
  module.def("set_device", [](int device) { device_now = device; });
  module.def("current_stream", [](int device) { return stream_now[device]; });
  module.def("set_stream", [](int device, int64_t stream) { stream_now[device] = stream; });
  module.def("as_cpu", &as_cpu);
  module.def("resize_storage", [](const at::Storage& storage, size_t bytes) { resize_storage(storage, bytes); });
  module.def("memory", [](int device) {
    std::lock_guard<std::mutex> guard(memory_lock);
    return std::make_tuple(memory[device].used, memory[device].peak, memory[device].limit);
  });
  module.def("forget_peak", [](int device) {
    std::lock_guard<std::mutex> guard(memory_lock);
    memory[device].peak = memory[device].used;
  });
  module.def("limit_memory", [](int device, int64_t bytes, const std::string& text) {
    std::lock_guard<std::mutex> guard(memory_lock);
    memory[device].limit = bytes;
    memory[device].text = text;
  });
  module.def("pinned_bytes", [] {
    std::lock_guard<std::mutex> guard(pinned_lock);
    int64_t bytes = 0;
    for (const auto& each : pinned) {
      bytes += each.second;
    }
    return bytes;
  });
}
