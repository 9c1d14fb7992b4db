//! Visits every state of a model, and finds the promises that it breaks.

use std::collections::{HashSet, VecDeque};
use std::fmt::Debug;
use std::hash::Hash;

use xxhash_rust::xxh3::Xxh3DefaultBuilder;

/// A state of a model.
pub(crate) trait Model: Copy + Eq + Hash + Debug {
    /// A rule that can be taken out.
    type Rule: Copy + Debug;
    /// Most states: a model with more has bounds that are too wide.
    const STATES_MAX: usize;

    /// The state in which all begins.
    fn new() -> Self;
    /// A promise that is broken here.
    fn broken(&self) -> Option<&'static str>;
    /// Adds the states that can come next, without a rule.
    fn successors(&self, without: Self::Rule, next: &mut Vec<Self>);
}

/// Visits every state within the bounds. Returns the first broken promise, or the number of states.
fn explore<M: Model>(without: M::Rule) -> Result<usize, (&'static str, Box<M>)> {
    let mut known: HashSet<M, Xxh3DefaultBuilder> = HashSet::default();
    let mut open = VecDeque::from([M::new()]);
    let mut next = Vec::new();
    while let Some(state) = open.pop_front() {
        if let Some(promise) = state.broken() {
            return Err((promise, Box::new(state)));
        }
        state.successors(without, &mut next);
        open.extend(next.drain(..).filter(|next| known.insert(*next)));
        assert!(known.len() < M::STATES_MAX, "the bounds are too wide: {} states", known.len());
    }
    Ok(known.len())
}

/// Every promise holds, in more than `least` states.
pub(crate) fn holds<M: Model>(nothing: M::Rule, least: usize) {
    let visited = explore::<M>(nothing);
    let visited = visited.unwrap_or_else(|(promise, state)| panic!("{promise}: {state:#?}"));
    assert!(visited > least, "the model has shrunk to {visited} states");
    eprintln!("{visited} states");
}

/// Without each of these rules a promise is broken.
pub(crate) fn breaks_without<M: Model>(rules: &[M::Rule]) {
    for without in rules {
        match explore::<M>(*without) {
            Err((promise, _)) => eprintln!("without {without:?}: {promise}"),
            Ok(visited) => panic!("without {without:?} nothing broke in {visited} states"),
        }
    }
}
