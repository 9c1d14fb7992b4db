{{/* The name of an object: (list . "push"). */}}
{{- define "ringpush.name" -}}
{{- printf "%s-%s" (index . 0).Release.Name (index . 1) | trunc 63 | trimSuffix "-" -}}
{{- end }}

{{/* What selects the pods of a component: (list . "push"). */}}
{{- define "ringpush.selector" -}}
{app.kubernetes.io/name: ringpush, app.kubernetes.io/instance: {{ (index . 0).Release.Name | quote }}, app.kubernetes.io/component: {{ index . 1 }}}
{{- end }}

{{/* Name, namespace and labels of an object of a component: (list . "push" "suffix of the name"). */}}
{{- define "ringpush.metadata" -}}
{{- $root := index . 0 }}
{{- $component := index . 1 -}}
name: {{ include "ringpush.name" (list $root (index . 2)) }}
namespace: {{ $root.Release.Namespace | quote }}
labels:
  app.kubernetes.io/name: ringpush
  app.kubernetes.io/instance: {{ $root.Release.Name | quote }}
  app.kubernetes.io/component: {{ $component }}
  app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
  app.kubernetes.io/managed-by: {{ $root.Release.Service }}
  helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "ringpush.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "ringpush.publicUrl" -}}
{{- if .Values.publicUrl -}}
{{ .Values.publicUrl }}
{{- else if eq .Values.balancer.kind "nginx" -}}
ws://{{ include "ringpush.name" (list . "nginx") }}.{{ .Release.Namespace }}.svc/n/{node}/v1/ws
{{- else -}}
{{ ternary "wss" "ws" (ne .Values.tls.push.secret "") }}://{node}.{{ include "ringpush.name" (list . "push") }}.{{ .Release.Namespace }}.svc:8080/v1/ws
{{- end -}}
{{- end }}

{{/* A value of YAML as one of TOML, in one line. */}}
{{- define "ringpush.toml" -}}
{{- if kindIs "map" . -}}
{{- $items := list -}}
{{- range $key, $value := . -}}
{{- $items = append $items (printf "%s = %s" ($key | toJson) (include "ringpush.toml" $value)) -}}
{{- end -}}
{ {{- join ", " $items -}} }
{{- else if kindIs "slice" . -}}
{{- $items := list -}}
{{- range . -}}
{{- $items = append $items (include "ringpush.toml" .) -}}
{{- end -}}
[ {{- join ", " $items -}} ]
{{- else -}}
{{ . | toRawJson }}
{{- end -}}
{{- end }}

{{/* ringpush.toml: what the chart knows, and `config` above it. */}}
{{- define "ringpush.config" -}}
{{- $ours := dict
  "push" (dict "public_url" (include "ringpush.publicUrl" .))
  "auth" (dict "mode" "remote" "url" (printf "http://%s:8082" (include "ringpush.name" (list . "auth"))))
  "data" (dict "dir" "/data")
-}}
{{- range $section, $keys := mergeOverwrite $ours (deepCopy .Values.config) }}
[{{ $section }}]
{{- range $key, $value := $keys }}
{{ $key }} = {{ include "ringpush.toml" $value }}
{{- end }}
{{ end -}}
{{- end }}

{{/* What of the configuration a restart alone takes: a change of it replaces the pods. The others are those of docs/protocol.md,
"Taken without a restart". */}}
{{- define "ringpush.restarts" -}}
{{- $taken := dict
  "push" (list "origins" "trusted_proxies")
  "log" (list "level")
  "limits" (list "message_bytes" "recipients" "batch" "message_ttl_s" "topic_message_bytes" "everyone_message_bytes" "topic_per_s"
    "everyone_per_s" "sessions_per_user" "sessions_per_device" "auth_deadline_ms" "auth_failures_per_min" "handshakes_per_address"
    "client_frames_per_s")
-}}
{{- $left := dict -}}
{{- range $section, $keys := .Values.config -}}
{{- $rest := omit $keys -}}
{{- range $key := get $taken $section | default list -}}
{{- $rest = unset (deepCopy $rest) $key -}}
{{- end -}}
{{- if $rest -}}
{{- $left = set $left $section $rest -}}
{{- end -}}
{{- end -}}
{{ list $left (include "ringpush.publicUrl" .) | toJson | sha256sum }}
{{- end }}

{{/* Files of a Secret under /etc/ringpush: (list "name of the volume" "Secret" (list "key" …)). */}}
{{- define "ringpush.secretVolume" -}}
- name: {{ index . 0 }}
  secret:
    secretName: {{ index . 1 }}
    defaultMode: 0440
    items:
    {{- range index . 2 }}
    - {key: {{ . }}, path: {{ . }}}
    {{- end }}
{{- end }}

{{/* What every pod may not do. */}}
{{- define "ringpush.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile: {type: RuntimeDefault}
{{- end }}
{{- define "ringpush.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* The files of the Secret that a role uses, each with the environment variable that names it. */}}
{{- define "ringpush.secretFiles" -}}
{{- $secret := (index . 0).Values.secret -}}
{{- $token := ternary (dict "token-keys" "AUTH__TOKEN_KEYS") (dict "token-key" "AUTH__TOKEN_KEY") $secret.tokenKeys -}}
{{- $api := ternary (dict "keys" "COLLECT__KEYS") (dict "api-keys" "COLLECT__API_KEYS") $secret.namedKeys -}}
{{- $peer := dict "peer-secret" "PEER__SECRETS" -}}
{{- $redis := dict "redis-url" "REDIS__URL" -}}
{{- $mongo := dict "mongo-uri" "MONGO__URI" -}}
{{- $of := dict
  "auth" (merge (dict "admin-key" "AUTH__ADMIN_KEY") $token)
  "collect" (merge (dict) $api $peer $redis $mongo)
  "dispatch" (merge (dict) $peer $redis)
  "push" (merge (dict) $peer $redis $mongo)
  "audit" (merge (dict) $token (ternary (dict "audit-key" "COLLECT__API_KEYS") $api $secret.namedKeys))
-}}
{{ get $of (index . 1) | toJson }}
{{- end }}

{{/* The pod of a role: (list . "push" (list (dict "name" "http" "port" 8080) …)). */}}
{{- define "ringpush.pod" -}}
{{- $root := index . 0 }}
{{- $role := index . 1 }}
{{- $ports := index . 2 }}
{{- $values := get $root.Values $role }}
{{- $grace := dict "auth" 25 "collect" 30 "dispatch" 25 "push" (add 20 $root.Values.config.push.drain_window_s) }}
{{- $tls := $root.Values.tls }}
{{- $isPeer := ne $role "auth" -}}
metadata:
  labels: {{ include "ringpush.selector" (list $root $role) }}
  annotations:
    checksum/config: {{ include "ringpush.restarts" $root }}
    {{- with $values.annotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  automountServiceAccountToken: false
  enableServiceLinks: false
  {{- if eq $role "push" }}
  # 5 s of preStop, the drain window, 15 s to finish.
  {{- end }}
  terminationGracePeriodSeconds: {{ get $grace $role }}
  {{- with $root.Values.image.pullSecrets }}
  imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
  {{- end }}
  securityContext:
    {{- include "ringpush.podSecurity" $root | nindent 4 }}
  topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector: {matchLabels: {{ include "ringpush.selector" (list $root $role) }}}
  {{- with $values.nodeSelector }}
  nodeSelector: {{ toJson . }}
  {{- end }}
  {{- with $values.tolerations }}
  tolerations: {{ toJson . }}
  {{- end }}
  containers:
  - name: ringpush
    image: {{ include "ringpush.image" $root }}
    {{- with $root.Values.image.pullPolicy }}
    imagePullPolicy: {{ . }}
    {{- end }}
    args: [serve, --config, /etc/ringpush/config/ringpush.toml, --roles, {{ $role }}, --log, json]
    env:
    - {name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
    - {name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
    {{- range $key, $variable := include "ringpush.secretFiles" (list $root $role) | fromJson }}
    - {name: RINGPUSH_{{ $variable }}_FILE, value: /etc/ringpush/secrets/{{ $key }}}
    {{- end }}
    {{- if eq $role "auth" }}
    # Auth uses no store; that one is named is what makes this no development.
    - {name: RINGPUSH_REDIS__URL, value: "redis://not-used-by-auth"}
    {{- end }}
    {{- if and (has $role (list "push" "collect")) (get $tls $role).secret }}
    - {name: RINGPUSH_{{ upper $role }}__TLS__CERT, value: /etc/ringpush/tls/{{ $role }}/tls.crt}
    - {name: RINGPUSH_{{ upper $role }}__TLS__KEY, value: /etc/ringpush/tls/{{ $role }}/tls.key}
    {{- end }}
    {{- if and $isPeer $tls.peer.secret }}
    - {name: RINGPUSH_PEER__TLS__CERT, value: /etc/ringpush/tls/peer/tls.crt}
    - {name: RINGPUSH_PEER__TLS__KEY, value: /etc/ringpush/tls/peer/tls.key}
    - {name: RINGPUSH_PEER__TLS__CA, value: /etc/ringpush/tls/peer/ca.crt}
    - {name: RINGPUSH_PEER__TLS__NAME, value: {{ $tls.peer.name | quote }}}
    {{- end }}
    {{- if and $isPeer $tls.redis.secret }}
    - {name: RINGPUSH_REDIS__TLS__CA, value: /etc/ringpush/tls/redis/ca.crt}
    {{- end }}
    ports:
    {{- range $ports }}
    - {name: {{ .name }}, containerPort: {{ .port }}}
    {{- end }}
    - {name: ops, containerPort: 9090}
    startupProbe: {httpGet: {path: /livez, port: ops}, periodSeconds: 1, failureThreshold: 60}
    livenessProbe: {httpGet: {path: /livez, port: ops}, periodSeconds: 10, timeoutSeconds: 5, failureThreshold: 3}
    readinessProbe: {httpGet: {path: /readyz, port: ops}, periodSeconds: 2, timeoutSeconds: 2, failureThreshold: 1}
    lifecycle: {preStop: {sleep: {seconds: 5}}}
    resources: {{ toJson $values.resources }}
    securityContext:
      {{- include "ringpush.containerSecurity" $root | nindent 6 }}
    volumeMounts:
    - {name: config, mountPath: /etc/ringpush/config, readOnly: true}
    - {name: secrets, mountPath: /etc/ringpush/secrets, readOnly: true}
    - {name: data, mountPath: /data}
    {{- if and (has $role (list "push" "collect")) (get $tls $role).secret }}
    - {name: tls-{{ $role }}, mountPath: /etc/ringpush/tls/{{ $role }}, readOnly: true}
    {{- end }}
    {{- if and $isPeer $tls.peer.secret }}
    - {name: tls-peer, mountPath: /etc/ringpush/tls/peer, readOnly: true}
    {{- end }}
    {{- if and $isPeer $tls.redis.secret }}
    - {name: tls-redis, mountPath: /etc/ringpush/tls/redis, readOnly: true}
    {{- end }}
    {{- if and (has $role (list "push" "collect")) $tls.mongo.secret }}
    - {name: tls-mongo, mountPath: /etc/ringpush/tls/mongo, readOnly: true}
    {{- end }}
  volumes:
  - {name: config, configMap: {name: {{ include "ringpush.name" (list $root "config") }}}}
  - {name: data, emptyDir: {}}
  {{- include "ringpush.secretVolume" (list "secrets" $root.Values.secret.name (include "ringpush.secretFiles" (list $root $role) | fromJson | keys | sortAlpha)) | nindent 2 }}
  {{- if and (has $role (list "push" "collect")) (get $tls $role).secret }}
  {{- include "ringpush.secretVolume" (list (printf "tls-%s" $role) (get $tls $role).secret (list "tls.crt" "tls.key")) | nindent 2 }}
  {{- end }}
  {{- if and $isPeer $tls.peer.secret }}
  {{- include "ringpush.secretVolume" (list "tls-peer" $tls.peer.secret (list "tls.crt" "tls.key" "ca.crt")) | nindent 2 }}
  {{- end }}
  {{- if and $isPeer $tls.redis.secret }}
  {{- include "ringpush.secretVolume" (list "tls-redis" $tls.redis.secret (list "ca.crt")) | nindent 2 }}
  {{- end }}
  {{- if and (has $role (list "push" "collect")) $tls.mongo.secret }}
  {{- include "ringpush.secretVolume" (list "tls-mongo" $tls.mongo.secret (list "ca.crt")) | nindent 2 }}
  {{- end }}
{{- end }}

{{/* A role without a place of its own: (list . "collect" ports). */}}
{{- define "ringpush.deployment" -}}
{{- $root := index . 0 }}
{{- $role := index . 1 }}
{{- $scaled := and (hasKey $root.Values.autoscaling $role) (get $root.Values.autoscaling $role).enabled -}}
apiVersion: apps/v1
kind: Deployment
metadata:
  {{- include "ringpush.metadata" (list $root $role $role) | nindent 2 }}
spec:
  {{- include "ringpush.replicas" (list $root "Deployment" $role $scaled) | nindent 2 }}
  selector: {matchLabels: {{ include "ringpush.selector" (list $root $role) }}}
  strategy: {type: RollingUpdate, rollingUpdate: {maxUnavailable: 0, maxSurge: 1}}
  template:
    {{- include "ringpush.pod" . | nindent 4 }}
{{- end }}

{{/* Where audits ask for a socket. */}}
{{- define "ringpush.auditTarget" -}}
{{- if eq .Values.balancer.kind "nginx" -}}
http://{{ include "ringpush.name" (list . "nginx") }}
{{- else -}}
{{ ternary "https" "http" (ne .Values.tls.push.secret "") }}://{{ include "ringpush.name" (list . "push-ready") }}:8080
{{- end -}}
{{- end }}
{{/* The pod of an audit: (list . (list "--users=20" …) (dict "ports" …)); the last are further fields of the container. */}}
{{- define "ringpush.auditPod" -}}
{{- $root := index . 0 }}
{{- $args := index . 1 }}
{{- $tls := $root.Values.tls -}}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with $root.Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
- name: {{ . }}
{{- end }}
{{- end }}
securityContext:
  {{- include "ringpush.podSecurity" $root | nindent 2 }}
containers:
- name: audit
  image: {{ include "ringpush.image" $root }}
  {{- with $root.Values.image.pullPolicy }}
  imagePullPolicy: {{ . }}
  {{- end }}
  args:
  - audit
  - --target={{ include "ringpush.auditTarget" $root }}
  - --publish={{ ternary "https" "http" (ne $tls.collect.secret "") }}://{{ include "ringpush.name" (list $root "collect") }}:8081
  {{- range $args }}
  - {{ . }}
  {{- end }}
  env:
  {{- range $key, $variable := include "ringpush.secretFiles" (list $root "audit") | fromJson }}
  - {name: RINGPUSH_{{ $variable }}_FILE, value: /etc/ringpush/secrets/{{ $key }}}
  {{- end }}
  {{- if $tls.clientCa.secret }}
  - {name: SSL_CERT_FILE, value: /etc/ringpush/tls/client-ca/ca.crt}
  {{- end }}
  securityContext:
    {{- include "ringpush.containerSecurity" $root | nindent 4 }}
  {{- with index . 2 }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
  volumeMounts:
  - {name: secrets, mountPath: /etc/ringpush/secrets, readOnly: true}
  {{- if $tls.clientCa.secret }}
  - {name: tls-client-ca, mountPath: /etc/ringpush/tls/client-ca, readOnly: true}
  {{- end }}
volumes:
{{ include "ringpush.secretVolume" (list "secrets" $root.Values.secret.name (include "ringpush.secretFiles" (list $root "audit") | fromJson | keys | sortAlpha)) }}
{{- if $tls.clientCa.secret }}
{{ include "ringpush.secretVolume" (list "tls-client-ca" $tls.clientCa.secret (list "ca.crt")) }}
{{- end }}
{{- end }}

{{/* Parts of the network policies. `from`: the pods of a component, (list . "push"). */}}
{{- define "ringpush.from" }}
- podSelector: {matchLabels: {{ include "ringpush.selector" . }}}
{{- end }}
{{- define "ringpush.metricsRule" }}
- from:
  - namespaceSelector: {}
    podSelector: {matchLabels: {{ toJson .Values.networkPolicy.prometheus }}}
  ports: [{port: 9090}]
{{- end }}
{{- define "ringpush.dnsRule" }}
- ports: [{port: 53, protocol: UDP}, {port: 53, protocol: TCP}]
{{- end }}
{{- define "ringpush.redisRule" }}
- ports: {{ include "ringpush.ports" .Values.networkPolicy.redisPorts }}
{{- end }}

{{/* A node more moves its share of the users: only after a minute. One node fewer at a time, and the next one when it has drained. */}}
{{- define "ringpush.scalingBehavior" -}}
scaleUp: {stabilizationWindowSeconds: 60, policies: [{type: Percent, value: 50, periodSeconds: 120}]}
scaleDown: {stabilizationWindowSeconds: 900, policies: [{type: Pods, value: 1, periodSeconds: {{ min 1800 (add 20 .Values.config.push.drain_window_s) }}}]}
{{- end }}

{{/* Ports of a policy's rule: a list of numbers. */}}
{{- define "ringpush.ports" -}}
{{- $ports := list -}}
{{- range . -}}
{{- $ports = append $ports (printf "{port: %d}" (int .)) -}}
{{- end -}}
[{{ join ", " $ports }}]
{{- end }}

{{/* The number of pods: (list . "Deployment" "collect" whether an autoscaler sets it). Where it does, that of the object as it is: without
one in the manifest the API server would set it to 1 when the autoscaler is turned on. */}}
{{- define "ringpush.replicas" -}}
{{- $root := index . 0 -}}
{{- if not (index . 3) -}}
replicas: {{ (get $root.Values (index . 2)).replicas }}
{{- else -}}
{{- $live := lookup "apps/v1" (index . 1) $root.Release.Namespace (include "ringpush.name" (list $root (index . 2))) -}}
{{- with ($live.spec).replicas -}}
replicas: {{ . }}
{{- end -}}
{{- end -}}
{{- end }}
