//! Tasks that must not fail in silence.

use tokio::task::JoinError;

/// The result of a task that was spawned and awaited. Raises its panic again, so that no panic is
/// swallowed; a task that was cancelled has no result.
pub(crate) fn raised<T: Default>(ended: Result<T, JoinError>) -> T {
    raised_or_else(ended, T::default)
}

/// The same, with what stands for the result of a task that was cancelled.
pub(crate) fn raised_or_else<T>(ended: Result<T, JoinError>, cancelled: impl FnOnce() -> T) -> T {
    match ended {
        Ok(result) => result,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => cancelled(),
    }
}
