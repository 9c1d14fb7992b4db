//! The client libraries as their packages have them: the page is served the JavaScript one, and the
//! audit runs both as clients.

/// The modules of `@ringpush/client`, by their names in `src/`.
pub(crate) const JAVASCRIPT: [(&str, &str); 6] = [
    ("index.js", include_str!("../clients/javascript/src/index.js")),
    ("errors.js", include_str!("../clients/javascript/src/errors.js")),
    ("line.js", include_str!("../clients/javascript/src/line.js")),
    ("positions.js", include_str!("../clients/javascript/src/positions.js")),
    ("pump.js", include_str!("../clients/javascript/src/pump.js")),
    ("tabs.js", include_str!("../clients/javascript/src/tabs.js")),
];

/// The modules of the Python package, by their names in `src/ringpush/`.
pub(crate) const PYTHON: [(&str, &str); 4] = [
    ("__init__.py", include_str!("../clients/python/src/ringpush/__init__.py")),
    ("_errors.py", include_str!("../clients/python/src/ringpush/_errors.py")),
    ("_inbox.py", include_str!("../clients/python/src/ringpush/_inbox.py")),
    ("_publish.py", include_str!("../clients/python/src/ringpush/_publish.py")),
];

/// The program that runs many clients of `@ringpush/client` in one process.
pub(crate) const JAVASCRIPT_FLEET: &str = include_str!("../clients/javascript/fleet.mjs");

/// The program that runs many clients of the Python library in one process.
pub(crate) const PYTHON_FLEET: &str = include_str!("../clients/python/fleet.py");
