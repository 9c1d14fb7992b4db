# docker build -t ringpush .
# The version of cargo-auditable is that of .github/workflows/release.yml.
FROM docker.io/library/rust:1-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends cmake && rm -rf /var/lib/apt/lists/*
RUN cargo install cargo-auditable --version 0.7.7 --locked
WORKDIR /src
COPY . .
# The list of the dependencies goes into the program: scanners of images read it.
RUN cargo auditable build --release --locked && mkdir /empty

# No shell, no package manager: glibc, libgcc, the authorities' certificates, and the user 65532.
FROM gcr.io/distroless/cc-debian12:nonroot
COPY --from=build /src/target/release/ringpush /usr/local/bin/ringpush
COPY --from=build --chown=65532:65532 /empty /data
USER 65532:65532
WORKDIR /
VOLUME /data
ENV RINGPUSH_DATA=/data
ENTRYPOINT ["/usr/local/bin/ringpush"]
