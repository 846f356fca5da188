#include "gather.h"

using PyObject = _object;

// The part of CPython's stable ABI that is used here. Its headers may be missing on a user's machine.
extern "C" {
void Py_IncRef(PyObject*);
void Py_DecRef(PyObject*);
void PyErr_Clear(void);
PyObject* PyObject_Type(PyObject*);
long long PyLong_AsLongLong(PyObject*);
PyObject* PyObject_CallFunctionObjArgs(PyObject*, ...);
void* PyCapsule_GetPointer(PyObject*, const char*);
void* PyType_GetSlot(PyObject*, int);
}

namespace {

constexpr int kDescrGet = 54;  // Py_tp_descr_get of CPython's typeslots.h, part of the stable ABI
using DescrGet = PyObject* (*)(PyObject* descriptor, PyObject* object, PyObject* type);

// DLPack 1: the non-owning tensor and the exchange API, as in dlpack.h. The major version stands for this layout.
constexpr uint32_t kDLPackMajor = 1;

struct DLTensor {
  char* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  const int64_t* shape;
  const int64_t* strides;  // null: row-major (before DLPack 1.2)
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major, minor;
  const ExchangeApi* previous;  // an older version of the table
  void* allocate;
  void* owning_from_object;
  void* object_from_owning;
  int (*tensor_from_object)(void* object, DLTensor* out);
  void* current_stream;
};

constexpr int dtype_key(int code, int bits) { return code << 8 | bits; }
constexpr int kFloat32 = dtype_key(2, 32), kFloat16 = dtype_key(2, 16), kBfloat16 = dtype_key(4, 16);

IvonHostObjects known;
int (*tensor_from_object)(void*, DLTensor*) = nullptr;
DescrGet get_grad = nullptr, get_requires_grad = nullptr, get_version = nullptr;

int64_t address_of(const void* pointer) { return static_cast<int64_t>(reinterpret_cast<intptr_t>(pointer)); }

int64_t address_of(const DLTensor& t) { return address_of(t.data) + static_cast<int64_t>(t.byte_offset); }

int64_t device_of(const DLTensor& t) { return int64_t{t.device_type} << 32 | static_cast<uint32_t>(t.device_id); }

int64_t dtype_of(const DLTensor& t) { return t.lanes == 1 ? dtype_key(t.code, t.bits) : -1; }

// False where torch cannot describe the tensor: sparse, on the meta device, without storage.
bool read_tensor(PyObject* object, DLTensor* out) {
  if (tensor_from_object(object, out) == 0) return true;
  PyErr_Clear();
  return false;
}

// The address stays valid: an instance keeps its type alive.
int64_t type_of(PyObject* object) {
  PyObject* type = PyObject_Type(object);
  Py_DecRef(type);
  return address_of(type);
}

// 1 or 0; -1 on an error.
int read_requires_grad(PyObject* param) {
  PyObject* value = get_requires_grad(known.requires_grad, param, known.tensor);
  if (value == nullptr) {
    PyErr_Clear();
    return -1;
  }
  const int result = value == known.yes;
  Py_DecRef(value);
  return result;
}

struct Entry {
  IvonHostRecord* record;
  int64_t *sizes, *strides, *grad_strides;

  explicit Entry(int64_t* at)
      : record(reinterpret_cast<IvonHostRecord*>(at)),
        sizes(at + sizeof(IvonHostRecord) / sizeof(int64_t)),
        strides(sizes + record->dims),
        grad_strides(strides + record->dims) {}

  int64_t* next() const { return grad_strides + record->dims; }

  // Strides of a dimension of size 1, or of fewer than two elements, mean nothing.
  bool same_layout(const DLTensor& t, const int64_t* expected) const {
    if (t.ndim != record->dims) return false;
    int64_t row_major = 1;
    for (int64_t d = record->dims - 1; d >= 0; --d) {
      if (t.shape[d] != sizes[d]) return false;
      const int64_t stride = t.strides == nullptr ? row_major : t.strides[d];
      if (sizes[d] != 1 && record->numel > 1 && stride != expected[d]) return false;
      row_major *= sizes[d];
    }
    return true;
  }

  // Whether the gradient may be the negative view that torch makes of a conjugated tensor's imaginary part: that is a
  // view of pairs, so none of its strides is 1.
  bool may_be_negative() const {
    if (record->numel == 0) return false;
    for (int64_t d = record->dims - 1; d >= 0; --d) {
      if (sizes[d] != 1 && grad_strides[d] == 1) return false;
    }
    return true;
  }
};

bool is_negative(PyObject* tensor) {
  PyObject* value = PyObject_CallFunctionObjArgs(known.is_neg, tensor, nullptr);
  if (value == nullptr) {
    PyErr_Clear();
    return true;
  }
  const bool result = value == known.yes;
  Py_DecRef(value);
  return result;
}

int grad_dtype_of(const DLTensor& t) {
  switch (dtype_of(t)) {
    case kFloat32:
      return 0;
    case kBfloat16:
      return 1;
    case kFloat16:
      return 2;
    default:
      return -1;
  }
}

// Checks one gradient against its parameter's record; false where it is for Python to judge.
bool read_grad(PyObject* grad, const Entry& entry, int64_t* address, int64_t* dtype) {
  DLTensor t;
  // A subclass may keep its elements elsewhere (DTensor), so only plain tensors are read.
  if (type_of(grad) != address_of(known.tensor) || !read_tensor(grad, &t)) return false;
  *address = address_of(t);
  *dtype = grad_dtype_of(t);
  if (*dtype < 0 || device_of(t) != entry.record->device || !entry.same_layout(t, entry.grad_strides)) return false;
  if (*address == 0 && entry.record->numel != 0) return false;
  return !entry.may_be_negative() || !is_negative(grad);
}

PyObject* new_grad_reference(const IvonHostList* list, int64_t i) {
  if (list->given == nullptr) return get_grad(known.grad, list->params[i], known.tensor);
  Py_IncRef(list->given[i]);
  return list->given[i];
}

bool moved(PyObject* param, const Entry& entry, bool trained) {
  DLTensor t;
  const IvonHostRecord& record = *entry.record;
  return type_of(param) != record.type || !read_tensor(param, &t) || address_of(t) != record.address ||
         device_of(t) != record.device || dtype_of(t) != record.dtype || !entry.same_layout(t, entry.strides) ||
         (trained && read_requires_grad(param) != record.requires_grad);
}

DescrGet getter(PyObject* descriptor) {
  PyObject* type = PyObject_Type(descriptor);
  auto* slot = reinterpret_cast<DescrGet>(PyType_GetSlot(type, kDescrGet));
  Py_DecRef(type);
  return slot;
}

}  // namespace

int ivon_host_abi(void) { return IVON_HOST_ABI; }

const char* ivon_host_init(const IvonHostObjects* objects) {
  const void* pointer = PyCapsule_GetPointer(objects->exchange_api, "dlpack_exchange_api");
  const auto* api = static_cast<const ExchangeApi*>(pointer);
  PyErr_Clear();
  if (api == nullptr) return "torch.Tensor.__dlpack_c_exchange_api__ is not a DLPack exchange API";
  while (api != nullptr && api->major > kDLPackMajor) api = api->previous;
  if (api == nullptr || api->major != kDLPackMajor) return "this torch has no DLPack exchange API of version 1";
  if (api->tensor_from_object == nullptr) return "this torch's DLPack exchange API cannot read a tensor in place";
  get_grad = getter(objects->grad);
  get_requires_grad = getter(objects->requires_grad);
  get_version = getter(objects->version);
  PyErr_Clear();
  const bool descriptors = get_grad != nullptr && get_requires_grad != nullptr && get_version != nullptr;
  if (!descriptors) return "torch.Tensor.grad is not a descriptor in this torch";
  known = *objects;
  tensor_from_object = api->tensor_from_object;
  return nullptr;
}

int ivon_host_record(const IvonHostList* list) {
  int64_t* at = list->records;
  const int64_t* end = at + list->capacity;
  for (int64_t i = 0; i < list->count; ++i) {
    PyObject* param = list->params[i];
    DLTensor t;
    const int requires_grad = read_requires_grad(param);
    if (requires_grad < 0 || !read_tensor(param, &t)) return -1;
    const int64_t width = static_cast<int64_t>(sizeof(IvonHostRecord) / sizeof(int64_t)) + 3 * int64_t{t.ndim};
    if (end - at < width) return -1;
    IvonHostRecord& record = *reinterpret_cast<IvonHostRecord*>(at);
    record = {type_of(param), address_of(t), device_of(t), dtype_of(t), requires_grad, t.ndim, 1};
    const Entry entry(at);
    for (int64_t d = record.dims - 1; d >= 0; --d) {
      entry.sizes[d] = t.shape[d];
      entry.strides[d] = t.strides == nullptr ? record.numel : t.strides[d];
      record.numel *= t.shape[d];
    }
    at = entry.next();
  }
  return at == end ? 0 : -1;
}

int ivon_host_moved(const IvonHostList* list, int trained) {
  int64_t* at = list->records;
  for (int64_t i = 0; i < list->count; ++i) {
    const Entry entry(at);
    if (moved(list->params[i], entry, trained != 0)) return 1;
    at = entry.next();
  }
  return 0;
}

int ivon_host_read_grads(const IvonHostList* list) {
  int flags = 0;
  int64_t* at = list->records;
  for (int64_t i = 0; i < list->count; ++i) {
    const Entry entry(at);
    PyObject* grad = new_grad_reference(list, i);
    if (grad == nullptr) {
      PyErr_Clear();
      return IVON_GRADS_IRREGULAR;
    }
    int64_t address = 0, dtype = 0;
    if (grad == known.none) {
      flags |= IVON_GRADS_MISSING;
    } else if (!read_grad(grad, entry, &address, &dtype)) {
      Py_DecRef(grad);
      return IVON_GRADS_IRREGULAR;
    }
    Py_DecRef(grad);
    if (list->grads[i] != address || list->grad_dtypes[i] != dtype) flags |= IVON_GRADS_CHANGED;
    list->grads[i] = address;
    list->grad_dtypes[i] = dtype;
    at = entry.next();
  }
  return flags;
}

int64_t ivon_host_versions(const IvonHostList* list) {
  int64_t sum = 0;
  for (int64_t i = 0; i < list->count; ++i) {
    PyObject* version = get_version(known.version, list->params[i], known.tensor);
    if (version == nullptr) {
      PyErr_Clear();
      continue;
    }
    sum += PyLong_AsLongLong(version);
    Py_DecRef(version);
  }
  return sum;
}
