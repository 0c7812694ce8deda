// CUDA devices that aren't there, for a torch that was built for CPUs: see simulated_devices.py.
//
// Such a torch leaves the dispatch key CUDA empty. What fills it here is one fallback for all ops:
// it checks devices as the real kernels do, runs the CPU's kernel on the same memory, and gives the
// result the device. Guard, hooks, allocator and generators are what torch asks of a backend too.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/op_registration/adaption.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_softmax.h>
#include <ATen/ops/_softmax_backward_data.h>
#include <ATen/ops/histc.h>
#include <ATen/ops/mm.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <chrono>
#include <unordered_set>

using namespace at;
using c10::DeviceIndex, c10::EventFlag, c10::Stream, torch::jit::Stack;

static constexpr DeviceIndex COUNT = DEVICES;
static thread_local DeviceIndex current = 0;

static Device indexed(Device device) {
  DeviceIndex index = device.has_index() ? device.index() : current;
  TORCH_CHECK(index < COUNT, "CUDA error: invalid device ordinal");
  return Device(kCUDA, index);
}

// --- memory: a storage may have a twin on the other side, which shares and keeps its bytes

struct Bytes {
  std::atomic<int64_t> now{0}, peak{0};
  void add(int64_t bytes) {
    int64_t sum = now += bytes, most = peak;
    while (sum > most && !peak.compare_exchange_weak(most, sum)) {}
  }
};
static Bytes allocated[COUNT];

struct Kept {  // the bytes of a twin: the storage that has them, counted where they are a device's
  Storage storage;
  Device device;
  int64_t bytes;
  Kept(const Storage& of, Device on) : storage(of), device(on), bytes(of.nbytes()) {
    if (device.is_cuda()) allocated[device.index()].add(bytes);
  }
  ~Kept() {
    if (device.is_cuda()) allocated[device.index()].add(-bytes);
  }
};

static DataPtr shared_bytes(const Storage& with, Device device) {
  auto* kept = new Kept(with, device);
  auto release = [](void* it) { delete static_cast<Kept*>(it); };
  return DataPtr(kept->storage.mutable_data(), kept, release, device);
}

static Storage on_cpu(size_t bytes) {
  auto* memory = GetCPUAllocator();
  return Storage(Storage::use_byte_size_t(), bytes, memory->allocate(bytes), memory, true);
}

struct SimulatedMemory final : Allocator {
  DataPtr allocate(size_t bytes) override {
    return shared_bytes(on_cpu(bytes), Device(kCUDA, current));
  }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};
static SimulatedMemory memory;

static Storage twin_of(const Storage& storage, Device device) {
  Allocator* by = device.is_cpu() ? GetCPUAllocator() : &memory;
  auto bytes = shared_bytes(storage, device);
  return Storage(Storage::use_byte_size_t(), storage.nbytes(), std::move(bytes), by, true);
}

// A tensor over `storage` of the shape of `like`; a view of `of`, if that is given.
static Tensor over(
    Storage storage, const Tensor& like, DispatchKey key, const Tensor* of = nullptr) {
  auto keys = of ? of->key_set() : DispatchKeySet(key);
  using at::detail::make_tensor;
  Tensor made = of
      ? make_tensor<TensorImpl>(TensorImpl::VIEW, std::move(storage), keys, like.dtype())
      : make_tensor<TensorImpl>(std::move(storage), keys, like.dtype());
  auto* impl = made.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.dim() == 0) impl->set_wrapped_number(like.unsafeGetTensorImpl()->is_wrapped_number());
  return made;
}

struct Twins {  // of the tensors of one call
  std::vector<std::pair<Storage, Storage>> storages;  // on the device, on the CPU
  std::vector<std::pair<Tensor, Tensor>> tensors;     // likewise

  Tensor cpu(const Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cuda()) return tensor;
    TORCH_CHECK(tensor.layout() == kStrided, "simulated devices hold no sparse tensors");
    for (auto& [theirs, ours] : tensors)
      if (theirs.is_same(tensor)) return ours;
    for (auto& [theirs, ours] : storages)
      if (theirs.is_alias_of(tensor.storage())) return add(tensor, ours);
    storages.emplace_back(tensor.storage(), twin_of(tensor.storage(), kCPU));
    return add(tensor, storages.back().second);
  }

  Tensor add(const Tensor& tensor, const Storage& ours) {
    tensors.emplace_back(tensor, over(ours, tensor, DispatchKey::CPU));
    return tensors.back().second;
  }

  // What a CPU kernel made: an argument itself, a view of one, or something new.
  Tensor back(const Tensor& made, Device device) {
    if (!made.defined() || !made.is_cpu()) return made;
    for (auto& [theirs, ours] : tensors)
      if (ours.is_same(made)) return theirs;
    for (auto& [theirs, ours] : tensors)
      if (ours.storage().unsafeGetStorageImpl() == made.storage().unsafeGetStorageImpl())
        return over(theirs.storage(), made, DispatchKey::CUDA, &theirs);
    if (device.is_cpu()) return made;
    return over(twin_of(made.storage(), device), made, DispatchKey::CUDA);
  }

  void hand_back_sizes() {  // of what the kernel resized
    for (auto& [theirs, ours] : storages) {
      if (ours.data() == theirs.data() && ours.nbytes() == theirs.nbytes()) continue;
      auto* impl = theirs.unsafeGetStorageImpl();
      impl->set_data_ptr_noswap(shared_bytes(ours, theirs.device()));
      impl->set_nbytes(ours.nbytes());
    }
    for (auto& [theirs, ours] : tensors) {
      if (theirs.sizes() == ours.sizes() && theirs.strides() == ours.strides()) continue;
      theirs.unsafeGetTensorImpl()->set_sizes_and_strides(
          ours.sizes(), ours.strides(), ours.storage_offset());
    }
  }
};

// --- random states: each device has one of its own, which draws as a CPU's does

struct DeviceGenerator final : c10::GeneratorImpl {
  Generator cpu;
  DeviceGenerator(DeviceIndex index, Generator of = at::detail::createCPUGenerator())
      : GeneratorImpl(Device(kCUDA, index), DispatchKeySet(DispatchKey::CUDA)),
        cpu(std::move(of)) {}
  void set_current_seed(uint64_t seed) override { cpu.set_current_seed(seed); }
  uint64_t current_seed() const override { return cpu.current_seed(); }
  uint64_t seed() override { return cpu.seed(); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  void set_state(const TensorImpl& state) override {
    cpu.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<TensorImpl> get_state() const override {
    return cpu.unsafeGetGeneratorImpl()->get_state();
  }
  DeviceGenerator* clone_impl() const override {
    return new DeviceGenerator(device().index(), cpu.clone());
  }
};
static std::vector<Generator> defaults;  // as many as devices, once Python has made them

static Generator cpu_generator(const Generator& of, Device device) {
  TORCH_CHECK(
      of.device().is_cuda(),
      "Expected a 'cuda' device type for generator but found '", of.device().type(), "'");
  TORCH_CHECK(
      of.device() == device,
      "Expected a '", device, "' generator device but found '", of.device(), "'");
  return static_cast<DeviceGenerator*>(of.unsafeGetGeneratorImpl())->cpu;
}

// --- the fallback: every op without a kernel below

static std::unordered_set<std::string> unchecked;  // ops whose CUDA kernels take scalars of a CPU

struct Call {
  const c10::FunctionSchema& schema;
  c10::ArrayRef<IValue> args;
  std::string base, name;         // without and with the overload: add, add.Tensor
  std::optional<Device> device;   // of the tensors
  std::optional<Device> wanted;   // by an argument `device`

  Call(const c10::OperatorHandle& op, const Stack& stack)
      : schema(op.schema()), args(torch::jit::last(stack, schema.arguments().size())) {
    base = schema.name().substr(schema.name().find("::") + 2);
    name = schema.overload_name().empty() ? base : base + "." + schema.overload_name();
    each([&](size_t i, const Tensor& tensor) {
      if (!tensor.is_cuda()) return;
      if (!device) device = tensor.device();
      if (*device != tensor.device()) refuse(i, tensor);
    });
    for (auto& arg : args) {
      if (!arg.isDevice()) continue;
      wanted = arg.toDevice().is_cuda() ? indexed(arg.toDevice()) : arg.toDevice();
    }
  }

  template <typename See>
  void each(See see) const {
    for (size_t i = 0; i < args.size(); i++) {
      if (args[i].isTensor() && args[i].toTensor().defined()) see(i, args[i].toTensor());
      if (!args[i].isList()) continue;
      for (const IValue& one : args[i].toListRef())
        if (one.isTensor() && one.toTensor().defined()) see(i, one.toTensor());
    }
  }

  void refuse(size_t i, const Tensor& tensor) const {
    TORCH_CHECK(
        false, "Expected all tensors to be on the same device, but found at least two devices, ",
        *device, " and ", tensor.device(), "! (simulated: argument ",
        schema.arguments()[i].name(), " of ", name, ")");
  }

  void check_devices() const {
    each([&](size_t i, const Tensor& tensor) {
      if (tensor.is_cuda() || !device) return;
      const auto& argument = schema.arguments()[i];
      bool is_written = argument.alias_info() && argument.alias_info()->isWrite();
      bool is_scalar = unchecked.count(name) && tensor.dim() == 0 && !is_written;
      bool is_index = args[i].isList() && argument.name() == "indices" &&
          base.find("index") != std::string::npos;
      if (!tensor.is_cpu() || !(is_scalar || is_index)) refuse(i, tensor);
    });
  }

  void check_kernel() const {  // what a CUDA build has no kernel for
    static const std::unordered_set<std::string> products{
        "mm", "bmm", "addmm", "addmm_", "baddbmm", "dot", "mv", "addmv"};
    if (products.count(base)) {
      auto dtype = args[0].toTensor().scalar_type();
      TORCH_CHECK(
          !isIntegralType(dtype, true), "\"", base, "_cuda\" not implemented for '", dtype, "'");
    }
    if (base == "linalg_lstsq" && device)
      for (auto& arg : args)
        TORCH_CHECK(
            !arg.isString() || arg.toStringRef() == "gels",
            "torch.linalg.lstsq: parameter `driver` should be gels on CUDA");
  }

  Device made_on() const { return wanted ? *wanted : device ? *device : Device(kCUDA, current); }

  IValue for_cpu(size_t i, Twins& twins) const {
    const IValue& arg = args[i];
    if (arg.isTensor()) return twins.cpu(arg.toTensor());
    if (arg.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& one : arg.toTensorVector()) list.push_back(twins.cpu(one));
      return list;
    }
    if (arg.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const auto& one : arg.toOptionalTensorVector())
        list.push_back(one ? std::optional<Tensor>(twins.cpu(*one)) : one);
      return list;
    }
    if (arg.isDevice()) return Device(kCPU);
    if (arg.isGenerator()) {
      const char* mixed = "Expected a 'cpu' device type for generator but found 'cuda'";
      TORCH_CHECK(device || wanted, mixed);
      return cpu_generator(arg.toGenerator(), made_on());
    }
    bool draws = arg.isNone() && schema.arguments()[i].type()->str() == "Generator?";
    if (draws && made_on().is_cuda() && !defaults.empty())
      return cpu_generator(defaults[made_on().index()], made_on());
    return arg;
  }
};

static void fallback(const c10::OperatorHandle& op, Stack* stack) {
  const Call call(op, *stack);
  call.check_devices();
  call.check_kernel();
  const Device device = call.made_on();
  Twins twins;
  Stack given;
  for (size_t i = 0; i < call.args.size(); i++) given.push_back(call.for_cpu(i, twins));
  op.callBoxed(given);
  twins.hand_back_sizes();
  torch::jit::drop(*stack, call.args.size());
  for (IValue& out : given) {
    if (out.isTensor()) {
      stack->emplace_back(twins.back(out.toTensor(), device));
    } else if (out.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& one : out.toTensorVector()) list.push_back(twins.back(one, device));
      stack->emplace_back(std::move(list));
    } else {
      stack->emplace_back(std::move(out));
    }
  }
}

// --- kernels of our own: copies between devices, storages, and ops that a CPU build lacks

static Tensor& copy_(Tensor& self, const Tensor& from, bool non_blocking) {
  Twins twins;
  twins.cpu(self).copy_(twins.cpu(from), non_blocking);
  return self;
}

static Tensor& set_storage(
    Tensor& self, Storage from, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  TORCH_CHECK(
      from.device() == self.device(), "Attempted to set the storage of a tensor on device \"",
      self.device(), "\" to a storage on different device \"", from.device(), "\"");
  std::vector<int64_t> strides = stride.vec();
  int64_t step = 1;
  for (int64_t i = size.size() - 1; strides.size() < size.size() && i >= 0; step *= size[i--])
    strides.insert(strides.begin(), step);
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(from));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, strides, offset);
  return self;
}

static Tensor& set_whole(Tensor& self, Storage from) {
  const int64_t size = from.nbytes() / self.itemsize();
  return set_storage(self, std::move(from), 0, {size}, {1});
}

static Tensor& set_tensor(Tensor& self, const Tensor& from) {
  return set_storage(self, from.storage(), from.storage_offset(), from.sizes(), from.strides());
}

static Tensor histogram(
    const Tensor& self, int64_t bins, const Scalar& least, const Scalar& most) {
  Twins twins;
  Tensor counts = histc(twins.cpu(self).to(kDouble), bins, least, most);  // mixtures of experts
  return twins.back(counts.to(self.scalar_type()), self.device());
}

static Tensor product_as(const Tensor& self, const Tensor& other, ScalarType dtype) {
  return mm(self.to(dtype), other.to(dtype));
}

// of half numbers in float: two kernels of a CPU
static Tensor softmax(const Tensor& self, int64_t dim, bool in_float) {
  Twins twins;
  Tensor given = twins.cpu(self);
  return twins.back(_softmax(in_float ? given.to(kFloat) : given, dim, false), self.device());
}

static Tensor softmax_backward(
    const Tensor& slope, const Tensor& made, int64_t dim, ScalarType dtype) {
  TORCH_CHECK(slope.device() == made.device(), "Expected all tensors to be on the same device");
  Twins twins;
  ScalarType own = made.scalar_type();
  Tensor back = _softmax_backward_data(twins.cpu(slope), twins.cpu(made), dim, own);
  return twins.back(back.to(dtype), slope.device());
}

static int64_t plain_attention(
    const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool,
    std::optional<double>, bool) {
  return 0;  // no flash attention
}
namespace at::native {
REGISTER_CUDA_DISPATCH(_fused_sdp_choice_stub, &plain_attention)
}

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("copy_", copy_);
  m.impl("histc", histogram);
  for (const char* op : {"convolution", "convolution_backward"})  // they choose kernels by device
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&fallback>());
  m.impl("mm.dtype", product_as);
  m.impl("_softmax", softmax);
  m.impl("_softmax_backward_data", softmax_backward);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Storage", set_whole);
  m.impl("set_.source_Tensor", set_tensor);
}

// --- what Python asks and says

TORCH_LIBRARY(simulated, m) {
  m.def("leave_unchecked(str[] names) -> ()", [](const std::vector<std::string>& names) {
    unchecked.insert(names.begin(), names.end());
  });
  m.def("default_generator(Generator? it) -> ()", [](const std::optional<Generator>& it) {
    defaults.push_back(*it);
  });
  m.def("current() -> int", []() -> int64_t { return current; });
  m.def("set_current(int index) -> int", [](int64_t index) -> int64_t {
    DeviceIndex old = current;
    if (index >= 0) current = indexed(Device(kCUDA, index)).index();
    return old;
  });
  m.def("allocated(int index) -> int", [](int64_t index) -> int64_t {
    return allocated[index].now;
  });
  m.def("peak(int index) -> int", [](int64_t index) -> int64_t { return allocated[index].peak; });
  m.def("reset_peak(int index) -> ()", [](int64_t index) {
    allocated[index].peak = allocated[index].now.load();
  });
}

// --- what torch asks about devices

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return kCUDA; }
  DeviceIndex deviceCount() const noexcept override { return COUNT; }
  Device getDevice() const override { return Device(kCUDA, current); }
  void setDevice(Device device) const override { current = indexed(device).index(); }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.has_index()) current = device.index();
  }
  Device exchangeDevice(Device device) const override {
    Device old(kCUDA, current);
    setDevice(device);
    return old;
  }
  Stream getStream(Device device) const override {
    return Stream(Stream::DEFAULT, indexed(device));
  }
  Stream getDefaultStream(Device device) const override { return getStream(device); }
  Stream getStreamFromGlobalPool(Device device, bool) const override { return getStream(device); }
  Stream getNewStream(Device device, int) const override { return getStream(device); }
  Stream exchangeStream(Stream stream) const override { return stream; }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  void record(void** event, const Stream&, const DeviceIndex, const EventFlag) const override {
    using namespace std::chrono;
    if (!*event) *event = new double;
    auto now = steady_clock::now().time_since_epoch();
    *static_cast<double*>(*event) = duration<double, std::milli>(now).count();
  }
  void destroyEvent(void* event, const DeviceIndex) const noexcept override {
    delete static_cast<double*>(event);
  }
  double elapsedTime(void* from, void* to, const DeviceIndex) const override {
    return *static_cast<double*>(to) - *static_cast<double*>(from);
  }
};
static Guard guard;
static c10::impl::DeviceGuardImplRegistrar guards(kCUDA, &guard);
static c10::AllocatorRegisterer<kCUDA> allocators(&memory);

namespace at {
struct CUDAHooks final : CUDAHooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return COUNT; }
  DeviceIndex deviceCount() const override { return COUNT; }
  DeviceIndex current_device() const override { return current; }
  DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(DeviceIndex index) const override { current = index; }
  DeviceIndex exchangeDevice(DeviceIndex index) const override {
    DeviceIndex old = current;
    current = index;
    return old;
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override {
    return index < 0 ? -1 : exchangeDevice(index);
  }
  void deviceSynchronize(DeviceIndex) const override {}
  Allocator* getPinnedMemoryAllocator() const override { return GetCPUAllocator(); }
  Allocator* getCUDADeviceAllocator() const override { return &memory; }
  Device getDeviceFromPtr(void*) const override { return Device(kCUDA, current); }
  const Generator& getDefaultGenerator(DeviceIndex index) const override {
    return defaults.at(index < 0 ? current : index);
  }
  Generator getNewGenerator(DeviceIndex index) const override {
    return make_generator<DeviceGenerator>(index < 0 ? current : index);
  }
};

// torch made the hooks of a CPU build as it was imported, an object of nothing but its virtual
// table: it is given ours.
static CUDAHooks hooks;
static bool hooked = [] {
  auto& theirs = const_cast<CUDAHooksInterface&>(detail::getCUDAHooks());
  *reinterpret_cast<void**>(&theirs) = *reinterpret_cast<void**>(&hooks);
  return true;
}();
}  // namespace at
