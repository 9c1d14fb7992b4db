# docker build -t ringpush .
FROM docker.io/library/rust:1-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends cmake && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN cargo build --release --locked

FROM docker.io/library/debian:bookworm-slim
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates && rm -rf /var/lib/apt/lists/* \
    && mkdir /data && chown 65532:65532 /data
COPY --from=build /src/target/release/ringpush /usr/local/bin/ringpush
USER 65532:65532
WORKDIR /
VOLUME /data
ENV RINGPUSH_DATA=/data
ENTRYPOINT ["ringpush"]
