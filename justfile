# The commands of daily work; `just --list` shows them.

# Run the server: all roles, embedded store, no services.
run:
    cargo run --release

# Unit and property tests: nothing needed.
test:
    cargo test --workspace --lib

# Everything that CI runs; installs what is missing.
ci:
    scripts/test

# Also the long scenarios of whole clusters.
all:
    scripts/test --all

# Formatting, lints, documentation.
check:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets -- -D warnings
    RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --document-private-items

# Licences, advisories, sources.
deny:
    cargo deny check

# Each fuzz target for so many seconds.
fuzz seconds="60":
    scripts/fuzz {{seconds}}
