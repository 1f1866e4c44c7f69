/* The host side of triton.py in C++: what a small tensor waits for, without Python's objects for each argument.

   Requirements
     - the launches are triton.py's: it plans, compiles and holds workspaces; here its answers are kept and programs launched;
     - what is rare is left to it: a function that does not know how to go on returns None;
     - nothing is linked but torch, and programs are launched by what Triton made: all is built and tested without a GPU.

   Any call of Python may let another thread run: what is in a container is held by its shared_ptr over such a call, never by
   reference. Calls of torch, and nothing else, go through `apart`: without the interpreter's lock, and below autograd, which
   other threads still need for theirs. */

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <cmath>
#include <memory>
#include <unordered_map>

namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Objects = std::vector<py::object>;

enum Program : int8_t { MOMENTS, NORMALIZE, GRADIENT_SUMS, INPUT_GRADIENT };
constexpr int MOST_TENSORS = 12, MOST_OWNED = 16, MOST_ARGUMENTS = 48; // of a program
constexpr size_t MOST_SHAPES = 4096;                                   // whose plans are kept
constexpr int8_t NONE = -1;

/* ---- what Python gave ---- */
struct Given {
    py::object kernels;                          // host.py
    py::object plans, workspace, stream, launch; // functions of plans.py, triton.py and host.py
    py::object hooks;                            // what has Triton's hooks
    py::object enter = py::str("launch_enter_hook"), exit = py::str("launch_exit_hook"), calls = py::str("calls");
};
Given *given; // never freed: Python may be gone before it

/* What a program was compiled for, beside the constants of its plan. */
struct Looks {
    Program program;
    int8_t device;
    uint8_t constants;
    uint16_t odd; // the tensors whose addresses 16 bytes do not divide
    std::array<int8_t, MOST_TENSORS> dtypes;
    bool operator==(const Looks &other) const {
        return program == other.program && device == other.device && constants == other.constants && odd == other.odd &&
               dtypes == other.dtypes;
    }
};
/* As triton.py's Launcher, which keeps what it launches. */
struct Launcher {
    Looks looks;
    py::object made, run, function, metadata;
};
struct Plan {
    py::object made;
    Objects grid, team, numbers, cut;
    int64_t counters, partials;
    std::vector<std::shared_ptr<Launcher>> launchers;
};
struct Plans {
    Plan sums, elements;
};
struct Shape {
    int64_t n, c, s, itemsize;
    bool operator==(const Shape &other) const {
        return n == other.n && c == other.c && s == other.s && itemsize == other.itemsize;
    }
};
struct HashOfShape {
    size_t operator()(const Shape &of) const {
        size_t hash = 0;
        for (int64_t number : {of.n, of.c, of.s, of.itemsize}) hash = hash * 1000003 + number;
        return hash;
    }
};
std::unordered_map<Shape, std::shared_ptr<Plans>, HashOfShape> *kept;

Plan plan_of(const py::object &made) {
    const auto items = [&](const char *name) {
        Objects found;
        for (const py::handle &item : made.attr(name)) found.push_back(py::reinterpret_borrow<py::object>(item));
        return found;
    };
    const auto number = [&](const char *name) { return made.attr(name).cast<int64_t>(); };
    return {made,         items("grid"),      {made.attr("team")}, items("numbers"),
            items("cut"), number("counters"), number("partials"),  {}};
}

/* Of x (N, C, *), contiguous or channels_last: see layout.planes. */
std::shared_ptr<Plans> plans_of(const Tensor &x) {
    const int64_t n = x.size(0), c = x.size(1), values = x.numel(), itemsize = x.element_size();
    const bool planes = values && x.is_contiguous();
    const Shape shape{planes ? n : values / c, c, planes ? values / (n * c) : 1, itemsize};
    const auto found = kept->find(shape);
    if (found != kept->end()) return found->second;
    const py::object made = given->plans(shape.n, shape.c, shape.s, shape.itemsize);
    const auto plans = std::make_shared<Plans>(Plans{plan_of(made.attr("sums")), plan_of(made.attr("elements"))});
    if (kept->size() >= MOST_SHAPES) kept->clear();
    return kept->emplace(shape, plans).first->second;
}

/* ---- tensors ---- */
/* What torch makes of tensors, below autograd. */
template <typename Make> auto apart(const Make &make) {
    const py::gil_scoped_release others_go_on;
    const at::AutoDispatchBelowADInplaceOrView below;
    return make();
}
constexpr c10::DispatchKeySet ELSEWHERE({c10::DispatchKey::Python, c10::DispatchKey::FuncTorchGradWrapper,
                                         c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::Functionalize,
                                         c10::DispatchKey::Negative, c10::DispatchKey::ZeroTensor});

/* Whether the values are those at the address. */
bool is_plain(const Tensor &x) { return x.layout() == at::kStrided && (x.key_set() & ELSEWHERE).empty(); }
/* Whether the programs can read a (C,) tensor, if it is there. */
bool is_vector(const MaybeTensor &value) { return !value || (is_plain(*value) && value->is_contiguous()); }
const Tensor *in(const MaybeTensor &value) { return value ? &*value : nullptr; }
Tensor like(const Tensor &dy, const Tensor &x) {
    const bool lies = x.is_contiguous() ? dy.is_contiguous() : dy.strides() == x.strides();
    return lies && dy.scalar_type() == x.scalar_type() && is_plain(dy) ? dy : at::empty_like(x).copy_(dy);
}
MaybeTensor like(const MaybeTensor &y, const Tensor &x) { return y ? MaybeTensor(like(*y, x)) : MaybeTensor(); }
/* Whether x is on a GPU that is not the current one. */
bool is_elsewhere(const Tensor &x) {
    return x.is_cuda() && c10::impl::getDeviceGuardImpl(x.device().type())->getDevice() != x.device();
}

/* ---- launches ---- */
bool is_called(const py::object &name) {
    const py::object hook = given->hooks.attr(name);
    if (hook.is_none()) return false;
    const py::object called = py::getattr(hook, given->calls, hook);
    const int truth = PyObject_IsTrue(called.ptr());
    if (truth < 0) throw py::error_already_set();
    return truth;
}

struct Arguments {
    std::initializer_list<const Tensor *> tensors; // nullptr: None
    std::initializer_list<double> numbers;
    std::initializer_list<bool> constants;
};

/* By triton.py, which compiles the program if it has to. */
void launch_there(const Looks &looks, const Tensor &x, Plan &plan, const Objects &team, const Arguments &arguments,
                  bool is_new) {
    py::list tensors, numbers, constants;
    for (const Tensor *tensor : arguments.tensors) tensors.append(tensor ? py::cast(*tensor) : py::none());
    for (const py::object &number : team) numbers.append(number);
    for (double number : arguments.numbers) numbers.append(number);
    for (bool constant : arguments.constants) constants.append(py::bool_(constant));
    const py::object made =
        given->launch(int(looks.program), x, plan.made, py::tuple(tensors), py::tuple(numbers), py::tuple(constants));
    if (!is_new || made.is_none()) return;
    plan.launchers.push_back(
        std::make_shared<Launcher>(Launcher{looks, made, made.attr("run"), made.attr("function"), made.attr("metadata")}));
}

/* By what Triton calls itself. */
void launch_here(const Launcher &known, const Tensor &x, const Plan &plan, const Objects &team, const Arguments &arguments,
                 const std::array<void *, MOST_TENSORS> &addresses) {
    PyObject *all[MOST_ARGUMENTS], *owned[MOST_OWNED];
    int count = 0, owns = 0;
    const auto put = [&](const py::object &object) { all[count++] = object.ptr(); };
    const auto own = [&](PyObject *object) { all[count++] = owned[owns++] = object; };
    const py::object stream = given->stream(x.get_device());
    for (const py::object &size : plan.grid) put(size);
    for (const py::object *object : {&stream, &known.function, &known.metadata}) put(*object);
    for (int nothing = 0; nothing < 3; ++nothing) all[count++] = Py_None; // metadata and functions for hooks
    for (size_t i = 0; i < arguments.tensors.size(); ++i) {
        if (known.looks.dtypes[i] == NONE) all[count++] = Py_None;
        else own(PyLong_FromVoidPtr(addresses[i]));
    }
    for (const py::object &number : team) put(number);
    for (double number : arguments.numbers) own(PyFloat_FromDouble(number));
    for (const py::object &number : plan.numbers) put(number);
    for (bool constant : arguments.constants) all[count++] = constant ? Py_True : Py_False;
    for (const py::object &constant : plan.cut) put(constant);
    PyObject *done = nullptr;
    if (!PyErr_Occurred()) done = PyObject_Vectorcall(known.run.ptr(), all, count, nullptr); // else there was no memory
    while (owns > 0) Py_XDECREF(owned[--owns]);
    if (done == nullptr) throw py::error_already_set();
    Py_DECREF(done);
}

void launch(Program program, const Tensor &x, Plan &plan, const Arguments &arguments, const Objects &team = {}) {
    Looks looks{program, int8_t(x.get_device()), 0, 0, {}};
    std::array<void *, MOST_TENSORS> addresses{};
    const size_t tensors = arguments.tensors.size(), owned = tensors + arguments.numbers.size();
    const size_t others =
        plan.grid.size() + 6 + team.size() + plan.numbers.size() + arguments.constants.size() + plan.cut.size();
    TORCH_CHECK(tensors <= MOST_TENSORS && owned <= MOST_OWNED && owned + others <= MOST_ARGUMENTS, "too many arguments");
    int i = 0;
    for (const Tensor *tensor : arguments.tensors) {
        addresses[i] = tensor ? tensor->data_ptr() : nullptr;
        looks.dtypes[i] = tensor ? int8_t(tensor->scalar_type()) : NONE;
        looks.odd |= uint16_t(uintptr_t(addresses[i]) % 16 != 0) << i;
        ++i;
    }
    for (bool constant : arguments.constants) looks.constants = looks.constants * 2 + constant;
    std::shared_ptr<Launcher> known;
    for (const auto &launcher : plan.launchers)
        if (launcher->looks == looks) known = launcher;
    if (known && !is_called(given->enter) && !is_called(given->exit)) {
        launch_here(*known, x, plan, team, arguments, addresses);
    } else {
        launch_there(looks, x, plan, team, arguments, known == nullptr);
    }
}

/* With what the splits of a sum need: triton.py's Workspace. */
struct Splits {
    Tensor counters, partials;
    Splits(const Tensor &x, const Plan &plan) {
        const py::tuple workspace = given->workspace(x, plan.counters, plan.partials);
        counters = workspace[0].cast<Tensor>(), partials = workspace[1].cast<Tensor>();
    }
};

/* ---- the seam (see kernels/__init__.py) ---- */
/* By what x is: the rest is seen in Python. */
bool takes(const Tensor &x) {
    const auto dtype = x.scalar_type();
    if (dtype != at::kFloat && dtype != at::kHalf && dtype != at::kBFloat16) return false;
    if (!is_plain(x) || x.size(1) == 0) return false;
    if (x.is_contiguous()) return true;
    if (x.dim() == 4) return x.is_contiguous(at::MemoryFormat::ChannelsLast);
    if (x.dim() == 5) return x.is_contiguous(at::MemoryFormat::ChannelsLast3d);
    return x.movedim(1, -1).is_contiguous();
}

MaybeTensor moments(const Tensor &x) {
    if (is_elsewhere(x)) return {};
    const auto plans = plans_of(x);
    const Tensor message = apart([&] { return at::empty({2 * x.size(1) + 1}, x.options().dtype(at::kDouble)); });
    const Splits splits(x, plans->sums);
    launch(MOMENTS, x, plans->sums, {{&x, &message, &splits.partials, &splits.counters}, {}, {}}, plans->sums.team);
    return message;
}

/* What a float does not hold of a number. */
double rest(double number) { return std::isfinite(number) ? number - float(number) : 0; }

using Normalized = std::tuple<Tensor, Tensor>; // y and the statistics to save
std::optional<Normalized> normalize(const Tensor &x, const Tensor &message, const MaybeTensor &weight, const MaybeTensor &bias,
                                    double eps, bool relu, const MaybeTensor &residual, const MaybeTensor &mean,
                                    const MaybeTensor &var, const MaybeTensor &tracked, double momentum) {
    for (const MaybeTensor *vector : {&weight, &bias, &mean, &var})
        if (!is_vector(*vector)) return {};
    if (is_elsewhere(x)) return {};
    const auto plans = plans_of(x);
    const auto [y, statistics, added] =
        apart([&] { return std::make_tuple(at::empty_like(x), at::empty_like(message), like(residual, x)); });
    launch(NORMALIZE, x, plans->elements,
           {{&x, &y, in(added), &message, &statistics, in(weight), in(bias), in(mean), in(var), in(tracked)},
            {float(eps), rest(eps), float(momentum), rest(momentum)},
            {relu, false}});
    for (const MaybeTensor *moved : {&mean, &var, &tracked})
        if (*moved && !(*moved)->is_inference()) (*moved)->unsafeGetTensorImpl()->bump_version();
    return Normalized(y, statistics);
}

using GradientSums = std::tuple<Tensor, Tensor, Tensor, MaybeTensor>; // the message, dγ, dβ, and dy where a ReLU goes by y
std::optional<GradientSums> gradient_sums(const Tensor &dy, const Tensor &x, const Tensor &statistics, const MaybeTensor &weight,
                                          const MaybeTensor &bias, const MaybeTensor &y, bool relu) {
    const bool by_x = relu && !y;
    if (is_elsewhere(x) || (by_x && !(is_vector(weight) && is_vector(bias)))) return {};
    const auto plans = plans_of(x);
    const int64_t c = x.size(1);
    const auto wide = statistics.options(), narrow = wide.dtype(at::kFloat); // float64
    const auto of_weight = weight && weight->scalar_type() == at::kDouble ? wide : narrow;
    const auto [gradient, by_y, passed] = apart([&] {
        return std::make_tuple(like(dy, x), like(y, x), y ? MaybeTensor(at::empty_like(x)) : MaybeTensor());
    });
    const auto [message, dweight, dbias] =
        apart([&] { return std::make_tuple(at::empty({2 * c}, wide), at::empty({c}, of_weight), at::empty({c}, of_weight)); });
    const Splits splits(x, plans->sums);
    launch(GRADIENT_SUMS, x, plans->sums,
           {{&gradient, &x, in(by_y), in(passed), &statistics, by_x ? in(weight) : nullptr, by_x ? in(bias) : nullptr, &message,
             &dweight, &dbias, &splits.partials, &splits.counters},
            {},
            {by_x}},
           plans->sums.team);
    return GradientSums(message, dweight, dbias, passed);
}

MaybeTensor input_gradient(const Tensor &dy, const Tensor &x, const Tensor &statistics, const MaybeTensor &weight,
                           const MaybeTensor &bias, bool by_x, const Tensor &message) {
    if (is_elsewhere(x) || !is_vector(weight) || !is_vector(bias)) return {};
    const auto [gradient, dx] = apart([&] { return std::make_tuple(like(dy, x), at::empty_like(x)); });
    if (x.numel() == 0) return dx;
    const auto plans = plans_of(x);
    launch(INPUT_GRADIENT, x, plans->elements,
           {{&gradient, &x, &dx, &message, &statistics, in(weight), in(bias)}, {}, {by_x}});
    return dx;
}

} // namespace

#include "host_node.h"

PYBIND11_MODULE(_host, module) {
    module.attr("Node") = node_class();
    module.def("record", &record);
    module.def("is_in_order", &is_in_order);
    module.def("use", [](py::object kernels, py::object plans, py::object workspace, py::object stream, py::object launch,
                         py::object hooks) {
        given = new Given{kernels, plans, workspace, stream, launch, hooks};
        kept = new std::remove_pointer_t<decltype(kept)>;
    });
    module.def("takes", &takes);
    module.def("moments", &moments);
    module.def("normalize", &normalize);
    module.def("gradient_sums", &gradient_sums);
    module.def("input_gradient", &input_gradient);
}
