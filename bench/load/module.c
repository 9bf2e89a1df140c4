/* The Python module around the load program, so that it comes with the package: broker._load. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

int load_main(int argc, char **argv);

static PyObject *module_main(PyObject *Py_UNUSED(module), PyObject *arguments) {
    if (!PyList_Check(arguments))
        return PyErr_Format(PyExc_TypeError, "a list of arguments, not %s", Py_TYPE(arguments)->tp_name);
    Py_ssize_t count = PyList_GET_SIZE(arguments);
    char **argv = PyMem_Calloc((size_t)count + 2, sizeof *argv);
    if (argv == NULL)
        return PyErr_NoMemory();
    argv[0] = "load";
    for (Py_ssize_t i = 0; i < count; i++) {
        argv[i + 1] = (char *)PyUnicode_AsUTF8(PyList_GET_ITEM(arguments, i));
        if (argv[i + 1] == NULL) {
            PyMem_Free(argv);
            return NULL;
        }
    }
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = load_main((int)count + 1, argv);
    Py_END_ALLOW_THREADS
    PyMem_Free(argv);
    return PyLong_FromLong(status);
}

static PyMethodDef methods[] = {
    {"main", module_main, METH_O,
     "main(arguments: list[str]) -> int\n\nRun the load program. It ends the process where it fails, so it needs one of its "
     "own; see broker.cli.load."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "broker._load", .m_doc = "The load program of the bench.", .m_methods = methods};

PyMODINIT_FUNC PyInit__load(void);

PyMODINIT_FUNC PyInit__load(void) {
    return PyModule_Create(&definition);
}
