//! The Kubernetes manifests: they build, they are valid, and the numbers that belong together are
//! the same.

use std::path::{Path, PathBuf};
use std::process::Command;

use ringpush_testing::tool;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}

fn rendered(overlay: &str) -> String {
    let output = Command::new("kubectl")
        .arg("kustomize")
        .arg(root().join("k8s/overlays").join(overlay))
        .output()
        .expect("kubectl is there: run scripts/test, which installs it");
    assert!(output.status.success(), "{overlay}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The documents of a kind, as text.
fn of_kind<'a>(all: &'a str, kind: &str) -> Vec<&'a str> {
    all.split("\n---\n").filter(|one| one.lines().any(|line| line == format!("kind: {kind}"))).collect()
}

#[test]
fn every_overlay_builds_and_every_object_is_valid() {
    for overlay in ["dev", "test", "prod"] {
        let text = rendered(overlay);
        // The schemas of Kubernetes 1.31 are in the PyPI package; a ServiceMonitor is of the
        // Prometheus operator.
        let built_in: Vec<&str> =
            text.split("\n---\n").filter(|one| !one.contains("apiVersion: monitoring.coreos.com")).collect();
        assert!(built_in.len() > 20, "{overlay} has {} objects", built_in.len());
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), built_in.join("\n---\n")).unwrap();
        let output = Command::new(tool("venv/bin/kubernetes-validate"))
            .args(["--strict", "-k", "1.31.0"])
            .arg(file.path())
            .output()
            .unwrap();
        let said =
            format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{overlay}: {said}");
    }
}

#[test]
fn the_grace_period_is_five_seconds_and_the_window_and_fifteen() {
    for (overlay, config) in [("dev", "k8s/base/ringpush.toml"), ("prod", "k8s/overlays/prod/ringpush.toml")]
    {
        let config: toml::Table = std::fs::read_to_string(root().join(config)).unwrap().parse().unwrap();
        let window = config["push"]["drain_window_s"].as_integer().unwrap();
        let text = rendered(overlay);
        let push =
            of_kind(&text, "StatefulSet").into_iter().find(|one| one.contains("  name: push\n")).unwrap();
        let grace = format!("terminationGracePeriodSeconds: {}", 5 + window + 15);
        assert!(push.contains(&grace), "{overlay}: not {grace}");
        assert!(push.contains("sleep:\n              seconds: 5"), "{overlay}: preStop");
    }
}

#[test]
fn every_pod_is_restricted_and_has_its_probes() {
    let text = rendered("prod");
    let mut pods = of_kind(&text, "Deployment");
    pods.extend(of_kind(&text, "StatefulSet"));
    assert_eq!(pods.len(), 5);
    for pod in pods {
        for needed in [
            "runAsNonRoot: true",
            "readOnlyRootFilesystem: true",
            "allowPrivilegeEscalation: false",
            "- ALL",
            "type: RuntimeDefault",
            "enableServiceLinks: false",
            "automountServiceAccountToken: false",
            "readinessProbe:",
            "livenessProbe:",
            "preStop:",
        ] {
            assert!(pod.contains(needed), "{needed} is missing in:\n{pod}");
        }
    }
    assert_eq!(of_kind(&text, "PodDisruptionBudget").len(), 5);
    assert_eq!(of_kind(&text, "NetworkPolicy").len(), 5);
    assert_eq!(of_kind(&text, "HorizontalPodAutoscaler").len(), 3);
    assert_eq!(of_kind(&text, "ServiceMonitor").len(), 1);
}

#[test]
fn nginx_on_kubernetes_is_the_one_that_is_tested() {
    let read = |path: &str| std::fs::read_to_string(root().join(path)).unwrap();
    assert_eq!(read("config/nginx.conf"), read("k8s/base/nginx.conf"), "copy config/nginx.conf to k8s/base");
    assert!(
        !read("config/nginx.conf").contains("$request_uri") && !read("config/nginx.conf").contains("$args")
    );
}

/// Each role is given the secrets that it uses and no others.
#[test]
fn each_role_has_its_own_secrets_and_a_limit_of_memory() {
    let text = rendered("prod");
    let mut pods = of_kind(&text, "Deployment");
    pods.extend(of_kind(&text, "StatefulSet"));
    for (name, secrets) in [
        ("auth", &["token-key", "admin-key"][..]),
        ("collect", &["api-keys", "peer-secret", "redis-url", "mongo-uri"]),
        ("dispatch", &["peer-secret", "redis-url"]),
        ("push", &["peer-secret", "redis-url", "mongo-uri"]),
        ("nginx", &[]),
    ] {
        let pod = pods.iter().find(|pod| pod.contains(&format!("  name: {name}\n"))).unwrap();
        let given: Vec<&str> = pod
            .lines()
            .zip(pod.lines().skip(1))
            .filter(|(_, next)| next.trim() == "name: ringpush-secrets")
            .map(|(key, _)| key.trim().trim_start_matches("key: "))
            .collect();
        let (mut given, mut secrets) = (given, secrets.to_vec());
        given.sort_unstable();
        secrets.sort_unstable();
        assert_eq!(given, secrets, "{name}");
        assert!(pod.contains("limits:"), "{name} may use all memory of its node");
    }
}

#[test]
fn ports_are_open_to_those_who_need_them_both_ways() {
    let text = rendered("prod");
    let policies = of_kind(&text, "NetworkPolicy");
    for policy in &policies {
        assert!(policy.contains("- Ingress") && policy.contains("- Egress"), "{policy}");
        let (egress, ingress) = policy.split_once("  ingress:").unwrap();
        assert!(egress.contains("  egress:"), "{policy}");
        // Metrics are for Prometheus.
        for rule in ingress.split("  - from:").skip(1).filter(|rule| rule.contains("9090")) {
            assert!(rule.contains("app.kubernetes.io/name: prometheus"), "{rule}");
        }
        let open: Vec<&str> = ingress.split("  - from:").next().unwrap().lines().collect();
        assert!(
            !open.iter().any(|line| line.contains("9090") || line.contains("8083") || line.contains("7070"))
        );
    }
    let auth = policies.iter().find(|policy| policy.contains("  name: auth\n")).unwrap();
    let client = auth.split("- from:").find(|rule| rule.contains("ringpush.io/auth-client")).unwrap();
    assert!(!client.contains("namespaceSelector"), "of the own namespace alone: {client}");
}
