/* Autograd's node of eager training in C++, which runs `forward` and `backward` of eager.py, and what is checked before it.

   Requirements
     - the same as by torch.autograd.Function for who looks at the graph: names, hooks, what is saved, what is raised;
     - what is not known to be in order is left to arguments.py, which finds the words for what is wrong. */

#include <ATen/SequenceNumber.h>
#include <ATen/record_function.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/SafePyObject.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>

namespace {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

enum Input { X, WEIGHT, BIAS, RESIDUAL };
constexpr size_t INPUTS = 4, SAVED = 6; // the second of eager.py's Tensors
using Inputs = std::array<MaybeTensor, INPUTS>;
using Tensors = std::array<Tensor, SAVED>;
constexpr const char *FORWARD_NAME = "_SyncBatchNorm", *NAME = "_SyncBatchNormBackward"; // of torch.autograd.Function

/* A NamedTuple's, or a tuple's. */
py::handle item(py::handle of, int place) { return PyTuple_GET_ITEM(of.ptr(), place); }
Tensor tensor(py::handle given) { return given.is_none() ? Tensor() : given.cast<Tensor>(); }
MaybeTensor maybe(const Tensor &value) { return value.defined() ? MaybeTensor(value) : MaybeTensor(); }

/* An object that a node keeps, which may outlive Python. */
struct Object : c10::SafePyObject {
    explicit Object(py::object object) : SafePyObject(object.release().ptr(), getPyInterpreter()) {}
    py::handle get() const { return ptr(getPyInterpreter()); }
};

/* eager.py's functions, as it gives them. */
enum { FORWARD, BACKWARD, ALL_REDUCE };

/* The sum over the group, and whether running statistics are held. */
std::pair<Tensor, bool> all_reduce(py::handle functions, const Tensor &message, py::handle call, py::handle observers) {
    const py::tuple made = item(functions, ALL_REDUCE)(message, call, observers);
    return {made[0].cast<Tensor>(), made[1].cast<bool>()};
}

/* ---- backward ---- */
/* Whether nothing but these programs has to see what is made of dy: neither `wanted_backward` nor `is_watched` of Python. */
bool is_unwatched(const Tensor &dy) {
    return is_plain(dy) && !dy.key_set().has(c10::DispatchKey::Batched) && !at::GradMode::is_enabled() &&
           c10::impl::TorchDispatchModeTLS::stack_len() == 0 && !torch::autograd::ForwardADLevel::try_get_by_idx(0) &&
           !c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

struct Recorded : torch::autograd::Node {
    const Object functions, kept; // eager.py's
    const bool in_place;           // forward was
    std::array<int, INPUTS> edges; // what is None has none
    std::array<SavedVariable, SAVED> saved;

    Recorded(py::object functions, py::object kept, bool in_place, const Inputs &inputs)
        : functions(std::move(functions)), kept(std::move(kept)), in_place(in_place) {
        for (size_t i = 0; i < INPUTS; ++i) {
            edges[i] = inputs[i] ? int(num_outputs()) : NONE;
            if (inputs[i]) add_next_edge(torch::autograd::impl::gradient_edge(*inputs[i]));
        }
    }
    bool is_wanted(Input input) const { return edges[input] != NONE && task_should_compute_output(edges[input]); }
    std::string name() const override { return NAME; }
    void release_variables() override {
        const py::gil_scoped_acquire alone;
        for (SavedVariable &variable : saved) variable.reset_data();
    }
    variable_list apply(variable_list &&gradients) override {
        const py::gil_scoped_acquire alone;
        const Tensor dy = gradients[0].defined() ? gradients[0] : input_metadata(0).zeros_like();
        const c10::OptionalDeviceGuard there(dy.is_cuda() ? std::optional(dy.device()) : std::nullopt);
        Tensors tensors;
        for (size_t i = 0; i < SAVED; ++i) tensors[i] = saved[i].unpack(getptr());
        try {
            auto found = backward_in_place(dy, tensors);
            if (!found) found = backward(dy, tensors);
            variable_list passed(num_outputs());
            for (size_t i = 0; i < INPUTS; ++i)
                if (edges[i] != NONE) passed[edges[i]] = (*found)[i];
            return passed;
        } catch (py::error_already_set &error) { // as Python's own nodes do, for the thread that called
            error.restore();
            python_error raised;
            raised.persist();
            throw std::move(raised);
        }
    }
    /* The gradients of the inputs. */
    std::array<Tensor, INPUTS> backward(const Tensor &dy, const Tensors &tensors) {
        py::tuple given(SAVED);
        for (size_t i = 0; i < SAVED; ++i) given[i] = maybe(tensors[i]);
        const py::tuple made = item(functions.get(), BACKWARD)(dy, given, kept.get(), is_wanted(X), is_wanted(RESIDUAL));
        std::array<Tensor, INPUTS> found;
        for (size_t i = 0; i < INPUTS; ++i) found[i] = tensor(made[i]);
        return found;
    }
    /* The same without Python, where it is needed for the collective alone. */
    std::optional<std::array<Tensor, INPUTS>> backward_in_place(const Tensor &dy, const Tensors &tensors) {
        const Tensor &x = tensors[0], &statistics = tensors[1];
        const MaybeTensor weight = maybe(tensors[2]), bias = maybe(tensors[3]), y = maybe(tensors[4]);
        if (!in_place || !is_unwatched(dy) || !takes(x) || is_elsewhere(x)) return {};
        if (!is_vector(statistics) || !is_vector(weight) || !is_vector(bias)) return {};
        const py::handle relu = item(kept.get(), 0), call = item(kept.get(), 3);
        const bool by_x = relu.cast<bool>() && !y;
        const auto [sums, dweight, dbias, passed] = gradient_sums(dy, x, statistics, weight, bias, y, by_x).value();
        const auto [message, _] = all_reduce(functions.get(), sums, call.attr("backward")(), item(kept.get(), 4));
        std::array<Tensor, INPUTS> found{Tensor(), dweight, dbias}; // autograd gives them the dtype of the parameter
        if (is_wanted(X)) found[X] = input_gradient(passed ? *passed : dy, x, statistics, weight, bias, by_x, message).value();
        if (passed && is_wanted(RESIDUAL)) found[RESIDUAL] = *passed;
        return found;
    }
    void compiled_args(torch::dynamo::autograd::CompiledNodeArgs &) const override {
        TORCH_CHECK_NOT_IMPLEMENTED(false, "given compiled autograd over a node of what `python -m syncbn build` made; expected "
                                           "syncbn.kernels.extension.library = None before the forward");
    }
};

/* Releases of torch hold their nodes by one of two. */
template <typename Pointer> Pointer hold(Recorded *node) {
    if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) {
        return Pointer(node, [](auto *last) { deleteNode(last); });
    } else {
        return Pointer::unsafe_steal_from_new(node);
    }
}

/* ---- forward ---- */
struct Made {
    py::object y;
    Tensors tensors;
    py::object kept;
    bool in_place;
};

Made forward(py::handle functions, const Tensor &x, py::handle rest, py::handle compute) {
    const py::tuple made = item(functions, FORWARD)(x, rest, compute);
    Tensors tensors;
    for (size_t i = 0; i < SAVED; ++i) tensors[i] = tensor(item(made[1], int(i)));
    return {made[0], tensors, made[2], false};
}

/* The same without Python, where it is needed for the collective alone. */
std::optional<Made> forward_in_place(py::handle functions, const Tensor &x, const Inputs &inputs, py::handle rest,
                                     py::handle compute) {
    const py::handle affine = item(rest, 0), running = item(rest, 1), call = item(rest, 2), observers = item(rest, 3);
    const bool is_masked = !item(rest, 4).is_none();
    if (!given || !compute.is(given->kernels) || is_masked || is_elsewhere(x)) return {};
    const auto &[_, weight, bias, residual] = inputs;
    MaybeTensor mean, var, tracked;
    double momentum = 0;
    if (!running.is_none()) {
        if (item(running, 3).is_none()) return {};
        mean = maybe(tensor(item(running, 0))), var = maybe(tensor(item(running, 1))), tracked = maybe(tensor(item(running, 2)));
        momentum = item(running, 3).cast<double>();
    }
    if (!is_vector(weight) || !is_vector(bias) || !is_vector(mean) || !is_vector(var)) return {};
    const double eps = item(affine, 2).cast<double>();
    const bool relu = item(affine, 3).cast<bool>();
    const auto [message, held] = all_reduce(functions, moments(x).value(), call, observers);
    if (held) mean = var = tracked = {};
    const auto [y, statistics] = normalize(x, message, weight, bias, eps, relu, residual, mean, var, tracked, momentum).value();
    Tensors tensors{x, statistics};
    if (weight) tensors[2] = *weight;
    if (bias && relu && !residual) tensors[3] = *bias;
    if (residual) tensors[4] = y;
    return Made{py::cast(y), tensors, py::make_tuple(relu, eps, bias.has_value(), call, observers, false), true};
}

/* y of `forward`, which autograd differentiates by `backward`. */
py::object record(py::object functions, const Tensor &x, const MaybeTensor &weight, const MaybeTensor &bias,
                  const MaybeTensor &residual, py::handle rest, py::handle compute) {
    const Inputs inputs{x, weight, bias, residual};
    RECORD_FUNCTION(FORWARD_NAME, c10::ArrayRef<const c10::IValue>{}, at::sequence_number::peek());
    const bool wanted = torch::autograd::compute_requires_grad(x, weight, bias, residual);
    const Made made = [&] {
        const at::NoGradGuard apart;
        auto found = forward_in_place(functions, x, inputs, rest, compute);
        return found ? *found : forward(functions, x, rest, compute);
    }();
    if (!wanted) return made.y;
    const auto node = new Recorded(functions, made.kept, made.in_place, inputs);
    const auto held = hold<decltype(torch::autograd::Edge::function)>(node);
    const Tensor y = made.y.cast<Tensor>();
    torch::autograd::set_history(y, held);
    for (size_t i = 0; i < SAVED; ++i)
        if (made.tensors[i].defined()) node->saved[i] = SavedVariable(made.tensors[i], made.tensors[i].is_same(y));
    return made.y;
}

/* ---- what is checked ---- */
bool is_floating(const Tensor &value) {
    const auto dtype = value.scalar_type();
    return dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16 || dtype == at::kDouble;
}
/* Whether problem_of of arguments.py, with the same arguments, is known to find nothing. */
bool is_in_order(py::handle given_x, py::handle affine, py::handle running, py::handle channels) {
    if (!THPVariable_Check(given_x.ptr())) return false;
    const Tensor &x = THPVariable_Unpack(given_x.ptr());
    const auto is_symbolic = [](const Tensor &value) { return value.unsafeGetTensorImpl()->has_symbolic_sizes_strides(); };
    if (x.layout() != at::kStrided || is_symbolic(x)) return false;
    if (x.is_nested() || x.dim() < 2 || !is_floating(x)) return false;
    bool any = false;
    const auto fits = [&](py::handle value) {
        if (value.is_none()) return true;
        if (!THPVariable_Check(value.ptr())) return false;
        const Tensor &vector = THPVariable_Unpack(value.ptr());
        any = true;
        if (is_symbolic(vector) || vector.dim() != 1 || vector.numel() != x.size(1)) return false;
        return vector.device() == x.device() && is_floating(vector);
    };
    const py::handle eps = item(affine, 2);
    if (!PyFloat_CheckExact(eps.ptr()) || PyFloat_AS_DOUBLE(eps.ptr()) < 0) return false;
    if (!fits(item(affine, 0)) || !fits(item(affine, 1))) return false;
    if (!running.is_none()) {
        const py::handle tracked = item(running, 2), momentum = item(running, 3);
        if (!fits(item(running, 0)) || !fits(item(running, 1))) return false;
        if (!tracked.is_none() && !THPVariable_Check(tracked.ptr())) return false;
        if (!tracked.is_none() && THPVariable_Unpack(tracked.ptr()).device() != x.device()) return false;
        if (!momentum.is_none() && !PyFloat_CheckExact(momentum.ptr())) return false;
    }
    return any || channels.is_none() || (PyLong_CheckExact(channels.ptr()) && channels.equal(py::int_(x.size(1))));
}

/* Its class, as Python sees it. */
py::object node_class() {
    static PyTypeObject type;
    torch::autograd::_initFunctionPyTypeObject(type, NAME, nullptr, nullptr);
    torch::autograd::registerCppFunction(typeid(Recorded), &type);
    return py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject *>(&type));
}

} // namespace
