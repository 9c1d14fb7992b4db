//! Compiles the `.proto` files without a system `protoc`: messages for the room `wire`, calls for
//! `transport`.

#![allow(clippy::print_stdout)]

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    let files = protox::compile(["proto/peer.proto", "proto/collect.proto"], ["proto"])?;
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    for (folder, calls) in [("messages", false), ("calls", true)] {
        let out = out.join(folder);
        std::fs::create_dir_all(&out)?;
        let mut builder = tonic_prost_build::configure()
            .out_dir(&out)
            .bytes(".")
            .build_client(calls)
            .build_server(calls)
            .build_transport(false);
        if calls {
            builder = builder
                .extern_path(".ringpush.peer.v1", "crate::wire::proto::peer")
                .extern_path(".ringpush.v1", "crate::wire::proto::collect");
        }
        builder.compile_fds(files.clone())?;
    }
    Ok(())
}
