//! The chart: it renders, what it renders is valid and is what the program takes, and the numbers
//! that belong together are the same.

use std::collections::BTreeSet;
use std::io::Write;
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

use ringpush_testing::{clean, program, root, tool};

/// Everything that the chart can turn on at once.
const EVERYTHING: &str = r#"
publicUrl: wss://push.example.com/n/{node}/v1/ws
image: {digest: "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", pullPolicy: Always, pullSecrets: [registry]}
config:
  push: {origins: ["https://a.example", "https://b.example"], trusted_proxies: ["10.0.0.0/8"], weight: 1.5, drain_window_s: 120}
  limits: {sweep_ms: 20000, message_bytes: 60000}
  topics: {open: ["match-*"]}
secret: {tokenKeys: true, namedKeys: true}
tls:
  push: {secret: push-tls}
  collect: {secret: collect-tls}
  peer: {secret: peer-tls, name: peer.ringpush.internal}
  clientCa: {secret: client-ca}
  redis: {secret: redis-ca}
  mongo: {secret: mongo-ca}
balancer: {kind: none}
push: {nodeSelector: {disk: fast}, tolerations: [{key: sockets, operator: Exists}], annotations: {a: b}}
collect: {service: {type: LoadBalancer, annotations: {a: b}}}
autoscaling: {keda: {enabled: true}, collect: {enabled: true}, dispatch: {enabled: true}}
monitoring: {serviceMonitor: {enabled: true}, rules: {enabled: true}, dashboard: {enabled: true}}
canary: {enabled: true}
"#;

fn helm(words: &[&str], values: &str) -> Output {
    let mut helm = Command::new(tool("bin/helm"));
    helm.args(words).arg(root().join("k8s/chart"));
    helm.args(["--namespace", "ringpush", "--values", "-"]).stdin(Stdio::piped());
    let mut helm = helm.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    helm.stdin.take().unwrap().write_all(values.as_bytes()).unwrap();
    helm.wait_with_output().unwrap()
}

/// What the chart renders with these values.
fn rendered(values: &str) -> String {
    let output = helm(&["template", "ringpush"], values);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn values(kind: &str) -> String {
    std::fs::read_to_string(root().join(format!("k8s/values/{kind}.yaml"))).unwrap()
}

/// The objects of a rendering.
fn objects(text: &str) -> Vec<Value> {
    let script =
        "import json,sys,yaml; json.dump([d for d in yaml.safe_load_all(sys.stdin) if d], sys.stdout)";
    let mut python = Command::new(tool("venv/bin/python"));
    python.args(["-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut python = python.spawn().unwrap();
    python.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = python.wait_with_output().unwrap();
    assert!(output.status.success(), "{text}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn of_kind(objects: &[Value], kind: &str) -> Vec<Value> {
    objects.iter().filter(|one| one["kind"] == kind).cloned().collect()
}

fn named(objects: &[Value], kind: &str, name: &str) -> Value {
    let all = of_kind(objects, kind);
    all.into_iter().find(|one| one["metadata"]["name"] == name).unwrap_or_else(|| panic!("no {kind} {name}"))
}

/// The pods of all roles and of nginx, by the name of the component.
fn pods(objects: &[Value]) -> Vec<(String, Value)> {
    let owners = [of_kind(objects, "Deployment"), of_kind(objects, "StatefulSet")].concat();
    let component =
        |one: &Value| one["metadata"]["labels"]["app.kubernetes.io/component"].as_str().unwrap().to_owned();
    owners.iter().map(|one| (component(one), one["spec"]["template"]["spec"].clone())).collect()
}

#[test]
fn what_is_for_those_without_helm_is_what_the_chart_renders() {
    let place = tempfile::tempdir().unwrap();
    let done = Command::new(root().join("scripts/render")).arg(place.path()).status().unwrap();
    assert!(done.success());
    for kind in ["dev", "prod"] {
        let read = |folder: &std::path::Path| std::fs::read_to_string(folder.join(format!("{kind}.yaml")));
        let same = read(place.path()).unwrap() == read(&root().join("k8s/plain")).unwrap();
        assert!(same, "k8s/plain/{kind}.yaml is another one: run scripts/render");
    }
}

#[test]
fn every_object_is_valid() {
    for values in ["", &values("dev"), &values("prod"), EVERYTHING] {
        let text = rendered(values);
        assert!(objects(&text).len() > 20);
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &text).unwrap();
        // The schemas of Kubernetes 1.31 are in the PyPI package.
        let mut validate = Command::new(tool("venv/bin/kubernetes-validate"));
        let output = validate.args(["--strict", "-k", "1.31.0"]).arg(file.path()).output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        assert!(output.status.success(), "{said}");
        // Of the Prometheus operator and of KEDA, whose schemas are not there.
        for unknown in said.lines().filter(|line| line.contains("find schema")) {
            let theirs = ["ServiceMonitor", "PrometheusRule", "ScaledObject"];
            assert!(theirs.iter().any(|kind| unknown.contains(kind)), "{unknown}");
        }
    }
    let lint = helm(&["lint", "--strict"], EVERYTHING);
    assert!(lint.status.success(), "{}", String::from_utf8_lossy(&lint.stdout));
}

#[test]
fn values_that_are_wrong_are_refused_by_name() {
    for (values, named) in [
        ("pushh: {}", "pushh"),
        ("push: {replica: 3}", "replica"),
        ("publicUrl: push.example.com", "publicUrl"),
        ("publicUrl: wss://push.example.com/v1/ws", "publicUrl"),
        ("config: {push: {drain_window_s: 0}}", "drain_window_s"),
        ("config: {pushing: {}}", "pushing"),
        ("config: {push: {public_url: 'ws://a/{node}'}}", "set publicUrl instead"),
        ("image: {digest: 'sha256:abc'}", "digest"),
        ("balancer: {kind: haproxy}", "kind"),
        ("tls: {peer: {secret: peer-tls}}", "tls.peer.name"),
        ("tls: {push: {secret: push-tls}}", "balancer.kind"),
        ("secret: {create: true}", "secret.values.redis-url"),
        ("secret: {create: true, values: {token-key: short}}", "token-key"),
        ("autoscaling: {push: {min: 5, max: 4}}", "autoscaling.push.min"),
        ("autoscaling: {push: {enabled: true}, keda: {enabled: true}}", "only one of them"),
        ("canary: {users: 0}", "users"),
        ("canary: {enabled: true, everySeconds: 3600}", "canary.everySeconds"),
        ("config: {peer: {secret: a}}", "config.peer.secret: belongs into the Secret"),
        ("config: {collect: {api_keys: [a]}}", "config.collect.api_keys"),
        (
            "secret: {create: true, namedKeys: true, values: {redis-url: a, mongo-uri: b}}",
            "secret.values.keys",
        ),
        (
            "secret: {create: true, tokenKeys: true, values: {redis-url: a, mongo-uri: b}}",
            "secret.values.token-keys",
        ),
    ] {
        let output = helm(&["template", "ringpush"], values);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{values} is taken");
        assert!(said.contains(named), "{values}: {said}");
    }
    // Names of which no valid Service or StatefulSet could be made.
    for name in ["1app", "my.app", &"a".repeat(41)] {
        let output = helm(&["template", name], "");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains("the release's name"), "{name}: {said}");
    }
    assert!(helm(&["template", &"a".repeat(40)], "").status.success());
}

/// Each role is started as its pod would start it, but for its addresses and files.
#[test]
fn the_program_takes_the_configuration_of_each_pod() {
    let secret = "a-secret-of-a-test-with-32-bytes-or-more";
    for values in [&values("prod"), EVERYTHING] {
        let all = objects(&rendered(values));
        let config = named(&all, "ConfigMap", "ringpush-config")["data"]["ringpush.toml"].clone();
        let mut checked = 0;
        for (role, pod) in pods(&all).into_iter().filter(|(role, _)| role != "nginx" && role != "canary") {
            let place = tempfile::tempdir().unwrap();
            let file = place.path().join("ringpush.toml");
            std::fs::write(&file, config.as_str().unwrap()).unwrap();
            let mut check = Command::new(program());
            clean(&mut check);
            check.args(["config", "check"]).arg(&file).env("RINGPUSH_NODE__ROLES", &role);
            for variable in pod["containers"][0]["env"].as_array().unwrap() {
                let name = variable["name"].as_str().unwrap();
                let value = variable["value"].as_str().unwrap_or("10.0.0.1");
                let value = if name.contains("__TLS__") && !name.ends_with("NAME") {
                    root().join("tests/browser/launch.mjs").display().to_string()
                } else if let Some(key) = value.strip_prefix("/etc/ringpush/secrets/") {
                    let text = match key {
                        "token-keys" => json!([{"key": secret}]).to_string(),
                        "keys" => json!([{"name": "a", "secret": secret, "scopes": ["publish"]}]).to_string(),
                        "redis-url" if values == EVERYTHING => "rediss://redis:6379".to_owned(),
                        "redis-url" => "redis://redis:6379".to_owned(),
                        "mongo-uri" => "mongodb://mongo:27017/?replicaSet=rs0".to_owned(),
                        "token-key" | "admin-key" | "api-keys" | "peer-secret" => secret.to_owned(),
                        other => panic!("nobody reads the key {other}"),
                    };
                    std::fs::write(place.path().join(key), text).unwrap();
                    place.path().join(key).display().to_string()
                } else {
                    value.to_owned()
                };
                check.env(name, value);
            }
            let output = check.output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{role}: {said}\n{}", config.as_str().unwrap());
            assert!(!said.contains("development"), "{role}: {said}");
            checked += 1;
        }
        assert_eq!(checked, 4);
    }
}

/// What is taken while ringpush runs restarts no pod; what is not does.
#[test]
fn a_changed_configuration_restarts_pods_only_where_it_must() {
    let sum = |config: &str| {
        let text = rendered(&format!("publicUrl: 'ws://a/{{node}}'\nconfig: {{{config}}}"));
        let push = named(&objects(&text), "StatefulSet", "ringpush-push");
        push["spec"]["template"]["metadata"]["annotations"]["checksum/config"].as_str().unwrap().to_owned()
    };
    let before = sum("");
    let page = std::fs::read_to_string(root().join("docs/protocol.md")).unwrap();
    let (_, taken) = page.split_once("**Taken without a restart**").unwrap();
    let taken = taken.split_once("A\nconfiguration with a fault").unwrap().0;
    let names: Vec<&str> = taken.split('`').skip(1).step_by(2).collect();
    assert!(names.len() > 15, "{names:?}");
    let mut section = "";
    for name in names.into_iter().filter(|name| !name.ends_with("_key")) {
        let key = match name.split_once('.') {
            Some((in_section, key)) => {
                section = in_section;
                key
            }
            None => name,
        };
        if !key.is_empty() {
            let value = if section == "push" { "['https://c.example']" } else { "77" };
            let changed = sum(&format!("{section}: {{{key}: {value}}}"));
            assert_eq!(changed, before, "{section}.{key} restarts pods");
        }
    }
    for config in ["limits: {sweep_ms: 20000}", "push: {accept_per_s: 100}", "topics: {open: ['a-*']}"] {
        assert_ne!(sum(config), before, "{config} restarts no pod");
    }
}

#[test]
fn the_grace_period_and_the_pace_of_scaling_follow_the_drain_window() {
    for window in [60, 120] {
        let text = rendered(&format!(
            "config: {{push: {{drain_window_s: {window}}}}}\nautoscaling: {{push: {{enabled: true}}}}"
        ));
        let all = objects(&text);
        let push = named(&all, "StatefulSet", "ringpush-push");
        let pod = &push["spec"]["template"]["spec"];
        assert_eq!(pod["terminationGracePeriodSeconds"], 5 + window + 15);
        assert_eq!(pod["containers"][0]["lifecycle"], json!({"preStop": {"sleep": {"seconds": 5}}}));
        assert_eq!(push["spec"]["replicas"], Value::Null, "the autoscaler says how many");
        let scaler = named(&all, "HorizontalPodAutoscaler", "ringpush-push");
        let one_at_a_time = json!([{"type": "Pods", "value": 1, "periodSeconds": window + 20}]);
        assert_eq!(scaler["spec"]["behavior"]["scaleDown"]["policies"], one_at_a_time);
        let metric = json!([{"type": "Pods", "pods": {
            "metric": {"name": "ringpush_sessions"}, "target": {"type": "AverageValue", "averageValue": "10000"}
        }}]);
        assert_eq!(scaler["spec"]["metrics"], metric);
        let adapter = std::fs::read_to_string(root().join("k8s/prometheus-adapter.yaml")).unwrap();
        assert!(adapter.contains("as: ringpush_sessions"));
    }
    let all = objects(&rendered(EVERYTHING));
    let keda = named(&all, "ScaledObject", "ringpush-push");
    let query = &keda["spec"]["triggers"][0]["metadata"]["query"];
    assert_eq!(keda["spec"]["triggers"][0]["metadata"]["ignoreNullValues"], "false");
    assert_eq!(query, r#"sum(ringpush_sessions{namespace="ringpush",pod=~"ringpush-push-[0-9]+"})"#);
    assert_eq!(named(&all, "StatefulSet", "ringpush-push")["spec"]["replicas"], Value::Null);
}

#[test]
fn every_pod_is_restricted_and_has_its_probes() {
    let prod = objects(&rendered(&values("prod")));
    let mut all = pods(&prod);
    assert_eq!(all.len(), 5);
    for (_, pod) in &all {
        assert!(!pod["topologySpreadConstraints"].as_array().unwrap().is_empty());
        for probe in ["readinessProbe", "livenessProbe", "lifecycle"] {
            assert!(pod["containers"][0][probe].is_object(), "{probe} is missing in {pod}");
        }
    }
    let everything = objects(&rendered(EVERYTHING));
    all.extend(pods(&everything));
    all.extend(pods(&objects(&rendered(&values("dev")))));
    all.push(("test".to_owned(), named(&everything, "Pod", "ringpush-test")["spec"].clone()));
    for (name, pod) in all {
        assert_eq!(pod["securityContext"]["runAsNonRoot"], true, "{name}");
        assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault", "{name}");
        assert_eq!(pod["enableServiceLinks"], false, "{name}");
        assert_eq!(pod["automountServiceAccountToken"], false, "{name}");
        let container = &pod["containers"][0];
        let expected = json!({
            "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "capabilities": {"drop": ["ALL"]}
        });
        assert_eq!(container["securityContext"], expected, "{name}");
        let is_store = ["redis", "mongo"].contains(&name.as_str());
        assert!(
            is_store || container["resources"]["limits"]["memory"].is_string(),
            "{name} may use all memory"
        );
        // Each volume is there that a container mounts.
        let names = |all: &Value| -> BTreeSet<String> {
            all.as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap().to_owned()).collect()
        };
        assert_eq!(names(&pod["volumes"]), names(&container["volumeMounts"]), "{name}");
    }
    assert_eq!(of_kind(&prod, "PodDisruptionBudget").len(), 5);
    assert_eq!(of_kind(&prod, "NetworkPolicy").len(), 5);
    assert_eq!(of_kind(&prod, "HorizontalPodAutoscaler").len(), 3);
    assert_eq!(of_kind(&prod, "ServiceMonitor").len(), 1);
    assert_eq!(of_kind(&prod, "PrometheusRule").len(), 1);
}

/// Services and policies select the pods that there are.
#[test]
fn what_selects_pods_selects_some() {
    let all = objects(&rendered(&values("prod")));
    let owners = [of_kind(&all, "Deployment"), of_kind(&all, "StatefulSet")].concat();
    let labels: Vec<&Value> =
        owners.iter().map(|one| &one["spec"]["template"]["metadata"]["labels"]).collect();
    let mut selectors: Vec<Value> =
        of_kind(&all, "Service").iter().map(|one| one["spec"]["selector"].clone()).collect();
    for kind in ["NetworkPolicy", "PodDisruptionBudget", "Deployment", "StatefulSet"] {
        for one in of_kind(&all, kind) {
            let spec = &one["spec"];
            let selector = if kind == "NetworkPolicy" { &spec["podSelector"] } else { &spec["selector"] };
            selectors.push(selector["matchLabels"].clone());
        }
    }
    assert!(selectors.len() > 20);
    for selector in selectors {
        let wanted = selector.as_object().unwrap();
        let fits = |labels: &&&Value| wanted.iter().all(|(name, value)| labels[name] == *value);
        assert!(!wanted.is_empty() && labels.iter().any(|one| fits(&one)), "{selector} selects no pod");
    }
}

#[test]
fn nginx_on_kubernetes_is_the_one_that_is_tested() {
    let read = |path: &str| std::fs::read_to_string(root().join(path)).unwrap();
    let own = read("config/nginx.conf");
    assert_eq!(own, read("k8s/chart/files/nginx.conf"), "copy config/nginx.conf to k8s/chart/files");
    assert!(!own.contains("$request_uri") && !own.contains("$args"));
    let all = objects(&rendered(""));
    assert_eq!(named(&all, "ConfigMap", "ringpush-nginx")["data"]["nginx.conf"], own);
}

/// Each role is given the secrets that it uses and no others.
#[test]
fn each_role_has_its_own_secrets() {
    let all = pods(&objects(&rendered(&values("prod"))));
    for (name, secrets) in [
        ("auth", &["admin-key", "token-key"][..]),
        ("collect", &["api-keys", "mongo-uri", "peer-secret", "redis-url"]),
        ("dispatch", &["peer-secret", "redis-url"]),
        ("push", &["mongo-uri", "peer-secret", "redis-url"]),
        ("nginx", &[]),
    ] {
        let pod = &all.iter().find(|(role, _)| role == name).unwrap().1;
        let items =
            pod["volumes"].as_array().unwrap().iter().filter_map(|one| one["secret"]["items"].as_array());
        let given: Vec<&str> = items.flatten().map(|item| item["key"].as_str().unwrap()).collect();
        assert_eq!(given, secrets, "{name}");
        let environment = pod["containers"][0]["env"].to_string();
        assert!(
            !environment.contains("secretKeyRef"),
            "{name}: a variable does not change while the pod runs"
        );
    }
}

#[test]
fn ports_are_open_to_those_who_need_them_both_ways() {
    for values in [values("prod"), EVERYTHING.to_owned()] {
        let all = objects(&rendered(&values));
        let is_open = |port: u64| port == 8080 || port == 8081 || (port == 8083 && values == EVERYTHING);
        for policy in of_kind(&all, "NetworkPolicy") {
            let name = policy["metadata"]["name"].as_str().unwrap();
            assert!(policy["spec"]["policyTypes"].to_string().contains("Ingress"), "{name}");
            assert!(name == "ringpush-canary" || policy["spec"]["egress"].is_array(), "{name}");
            for rule in policy["spec"]["ingress"].as_array().unwrap() {
                for port in rule["ports"].as_array().unwrap() {
                    let port = port["port"].as_u64().unwrap();
                    assert!(rule["from"].is_array() || is_open(port), "{name} opens {port} to all");
                    let is_prometheus = rule["from"].to_string().contains("prometheus");
                    assert_eq!(port == 9090, is_prometheus, "{name}: metrics are for Prometheus: {rule}");
                }
            }
        }
        let auth = named(&all, "NetworkPolicy", "ringpush-auth");
        let rules = auth["spec"]["ingress"].as_array().unwrap();
        let client = rules.iter().find(|rule| rule.to_string().contains("ringpush.io/auth-client")).unwrap();
        assert!(!client.to_string().contains("namespaceSelector"), "of the own namespace alone: {client}");
    }
}
