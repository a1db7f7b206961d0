{{/* Names and labels. */}}
{{- define "tokenway.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 52 | trimSuffix "-" }}
{{- end }}

{{/* A name of at most so many characters, given as (name, most): what is cut ends with a hash of all of it. */}}
{{- define "tokenway.cut" -}}
{{- $name := index . 0 }}
{{- if le (len $name) (index . 1) }}{{ $name | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" ($name | trunc (sub (index . 1) 9 | int) | trimSuffix "-") (sha256sum $name | trunc 8) }}{{ end }}
{{- end }}

{{- define "tokenway.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- include "tokenway.cut" (list .Values.fullnameOverride 52) }}
{{- else if contains (include "tokenway.name" .) .Release.Name }}
{{- include "tokenway.cut" (list .Release.Name 52) }}
{{- else }}
{{- include "tokenway.cut" (list (printf "%s-%s" .Release.Name (include "tokenway.name" .)) 52) }}
{{- end }}
{{- end }}

{{/* Of an object in the namespace that is given: elsewhere than the release, where a release of the same name in
another namespace may have one as well, the release's namespace is in it. */}}
{{- define "tokenway.nameIn" -}}
{{- $root := index . 0 }}
{{- $name := include "tokenway.fullname" $root }}
{{- if eq (index . 1) $root.Release.Namespace }}{{ $name }}
{{- else }}{{ include "tokenway.cut" (list (printf "%s-%s" $name $root.Release.Namespace) 63) }}{{ end }}
{{- end }}

{{- define "tokenway.selector" -}}
app.kubernetes.io/name: {{ include "tokenway.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "tokenway.labels" -}}
{{ include "tokenway.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{/* An image by digest, or else by tag. */}}
{{- define "tokenway.image" -}}
{{- if .image.digest }}{{ .image.repository }}@{{ .image.digest }}{{ else }}{{ .image.repository }}:{{ default .appVersion .image.tag }}{{ end }}
{{- end }}

{{/* "true" or nothing. */}}
{{- define "tokenway.isPicker" -}}
{{- if has .Values.provider.name (list "istio-inferencepool" "envoy-gateway") }}true{{ end }}
{{- end }}

{{- define "tokenway.asksKubernetes" -}}
{{- if or .Values.modelServers.matchLabels (and (eq .Values.provider.name "istio-inferencepool") (not .Values.inferencePool.create)) }}true{{ end }}
{{- end }}

{{- define "tokenway.asksIstio" -}}
{{- if and (eq .Values.provider.name "istio") .Values.istio.discovery }}true{{ end }}
{{- end }}

{{- define "tokenway.pickerTls" -}}
{{- default (ternary "self-signed" "plain" (eq .Values.provider.name "istio-inferencepool")) .Values.picker.tls.mode }}
{{- end }}

{{- define "tokenway.pool" -}}
{{- default .Release.Name .Values.inferencePool.name }}
{{- end }}

{{- define "tokenway.gatewayNamespace" -}}
{{- default .Release.Namespace .Values.gateway.namespace }}
{{- end }}

{{/* Where the Envoys of the gateway run. */}}
{{- define "tokenway.podNamespace" -}}
{{- if .Values.gateway.podNamespace }}{{ .Values.gateway.podNamespace }}
{{- else if eq .Values.provider.name "envoy-gateway" }}envoy-gateway-system
{{- else }}{{ include "tokenway.gatewayNamespace" . }}{{ end }}
{{- end }}

{{/* Routes to the pool as istiod names them: namespace, HTTPRoute, number of the rule. */}}
{{- define "tokenway.routes" -}}
{{- $routes := .Values.istio.envoyFilter.routes }}
{{- if and .Values.httpRoute.create (not $routes) }}
{{- $routes = list (printf "%s.%s.0" .Release.Namespace (include "tokenway.fullname" .)) }}
{{- end }}
{{- toYaml $routes }}
{{- end }}

{{- define "tokenway.grace" -}}
{{- default (add (int .Values.leaveSeconds) (int .Values.drainSeconds) 15) .Values.terminationGracePeriodSeconds }}
{{- end }}

{{/* What no schema can say: refuses values that do not go together. */}}
{{- define "tokenway.validate" -}}
{{- $provider := .Values.provider.name }}
{{- if not (regexMatch "^[a-z]" (include "tokenway.fullname" .)) }}
{{- fail (printf "a Service's name begins with a letter, `%s` does not: set fullnameOverride" (include "tokenway.fullname" .)) }}
{{- end }}
{{- if and .Values.autoscaling.enabled (gt (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas)) }}
{{- fail "autoscaling.minReplicas exceeds autoscaling.maxReplicas" }}
{{- end }}
{{- $several := or (gt (int .Values.replicas) 1) .Values.autoscaling.enabled }}
{{- if and $several (not .Values.metadataCenter.url) }}
{{- fail "several replicas (replicas, autoscaling) share load and caches: set metadataCenter.url, such as redis://redis.default.svc:6379/0" }}
{{- end }}
{{- if and $several (eq $provider "istio") (hasPrefix "http" .Values.metadataCenter.url) }}
{{- fail "provider istio: several replicas need a metadataCenter.url of Redis: a gateway reports the end of a request to any replica, and Redis takes it to the one that decided" }}
{{- end }}
{{- if not (or .Values.clusters (include "tokenway.asksKubernetes" .) (include "tokenway.asksIstio" .)) }}
{{- fail "no model servers: set modelServers.matchLabels to the labels of their pods, or clusters to their addresses" }}
{{- end }}
{{- if and (eq $provider "envoy-gateway") (not .Values.modelServers.matchLabels) }}
{{- fail "provider envoy-gateway: set modelServers.matchLabels to the labels of the model servers' pods" }}
{{- end }}
{{- if and (eq $provider "istio") (not .Values.gateway.namespace) (not .Values.gateway.podNamespace) }}
{{- fail "provider istio: set gateway.namespace to the namespace of Istio's gateway: it alone may reach Tokenway" }}
{{- end }}
{{- if and (include "tokenway.isPicker" .) .Values.httpRoute.create (not .Values.gateway.name) }}
{{- fail (printf "provider %s: set gateway.name to the Gateway that the HTTPRoute joins, or httpRoute.create to false" $provider) }}
{{- end }}
{{- if and (eq $provider "istio-inferencepool") (not .Values.inferencePool.create) (not .Values.inferencePool.name) }}
{{- fail "inferencePool.create is false: set inferencePool.name to the pool that is there" }}
{{- end }}
{{- if and (eq $provider "istio-inferencepool") .Values.inferencePool.create (not .Values.modelServers.matchLabels) }}
{{- fail "provider istio-inferencepool: set modelServers.matchLabels to the labels of the pool's pods" }}
{{- end }}
{{- if and (include "tokenway.isPicker" .) (eq (include "tokenway.pickerTls" .) "secret") (not .Values.picker.tls.secret) }}
{{- fail "picker.tls.mode is secret: set picker.tls.secret to a Secret of type kubernetes.io/tls" }}
{{- end }}
{{- if and (eq $provider "envoy-gateway") (eq (include "tokenway.pickerTls" .) "self-signed") }}
{{- fail "provider envoy-gateway: picker.tls.mode is plain or secret; Envoy Gateway takes no certificate that it cannot check" }}
{{- end }}
{{- if and (eq $provider "envoy-gateway") (eq (include "tokenway.pickerTls" .) "secret") (not .Values.picker.tls.ca) }}
{{- fail "provider envoy-gateway: set picker.tls.ca to a ConfigMap with the CA of picker.tls.secret as ca.crt" }}
{{- end }}
{{- if and .Values.istio.clientCertificate (not .Values.istio.tls) }}
{{- fail "istio.clientCertificate is for TLS to istiod: set istio.tls to true" }}
{{- end }}
{{- if and .Values.envoy.tls.clientCa (not .Values.envoy.tls.secret) }}
{{- fail "envoy.tls.clientCa is for clients that speak TLS: set envoy.tls.secret to a Secret of type kubernetes.io/tls" }}
{{- end }}
{{- if and .Values.envoy.tls.secret (ne $provider "none") }}
{{- fail (printf "envoy.tls is of Tokenway's own Envoy, provider none: with provider %s clients speak TLS to the gateway" $provider) }}
{{- end }}
{{- if le (int (include "tokenway.grace" .)) (add (int .Values.leaveSeconds) (int .Values.drainSeconds) | int) }}
{{- fail "terminationGracePeriodSeconds must exceed leaveSeconds and drainSeconds together" }}
{{- end }}
{{- if and .Values.serviceMonitor.create .Values.networkPolicy.create (not .Values.networkPolicy.metrics) }}
{{- fail "serviceMonitor.create: say in networkPolicy.metrics who scrapes, such as [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: monitoring}}}]" }}
{{- end }}
{{- end }}

{{/* What Kubernetes is asked for. */}}
{{- define "tokenway.kubernetes" -}}
{{- if eq .Values.provider.name "istio-inferencepool" }}
pool: {name: {{ include "tokenway.pool" . }}}
{{- else }}
selectors:
- name: {{ include "tokenway.pool" . }}
  match_labels: {{- toYaml .Values.modelServers.matchLabels | nindent 4 }}
  target_ports: {{- toYaml .Values.modelServers.targetPorts | nindent 2 }}
{{- end }}
{{- end }}

{{/* What istiod is asked with: the token and the CA of the volume `istio`. */}}
{{- define "tokenway.istiod" -}}
address: {{ .Values.istio.address }}
namespace: {{ .Release.Namespace }}
{{- if .Values.istio.tls }}
tls:
  ca_file: /var/run/secrets/istio/root-cert.pem
  token_file: /var/run/secrets/tokens/istio-token
  {{- if .Values.istio.clientCertificate }}
  cert_file: /var/run/secrets/istio-client/tls.crt
  key_file: /var/run/secrets/istio-client/tls.key
  {{- end }}
{{- end }}
{{- end }}

{{/* The tokenway.yaml of the ConfigMap. */}}
{{- define "tokenway.config" -}}
{{- $server := dict "workers" (int .Values.workers) "run_dir" "/run/tokenway/sockets" "drain_s" .Values.drainSeconds }}
{{- /* Health and metrics have ports of their own: the admin port stays on loopback. */}}
{{- $picker := dict "health_listen" (list "0.0.0.0:9003") "metrics_listen" (list "0.0.0.0:9090") }}
{{- $config := dict "version" 1 "clusters_file" "clusters.json" "server" $server "endpoint_picker" $picker }}
{{- if include "tokenway.isPicker" . }}
{{- $_ := set $picker "listen" (list "0.0.0.0:9002") }}
{{- $_ := set $picker "fallbacks" .Values.picker.fallbacks }}
{{- $_ := set $picker "leave_s" .Values.leaveSeconds }}
{{- $tls := include "tokenway.pickerTls" . }}
{{- if eq $tls "self-signed" }}
{{- $_ := set $picker "self_signed" true }}
{{- else if eq $tls "secret" }}
{{- $_ := set $picker "listen_tls" (dict "cert_file" "/etc/tokenway-tls/tls.crt" "key_file" "/etc/tokenway-tls/tls.key") }}
{{- else }}
{{- $_ := set $picker "listen_insecure" true }}
{{- end }}
{{- else }}
{{- $_ := set $picker "listen" (list "127.0.0.1:9004") }}
{{- $_ := set $picker "leave_s" 0 }}
{{- if eq .Values.provider.name "istio" }}
{{- $_ := set $server "listen" (list "0.0.0.0:9002") }}
{{- $_ := set $server "listen_insecure" true }}
{{- $service := printf "%s.%s.svc.cluster.local:9002" (include "tokenway.fullname" .) .Release.Namespace }}
{{- $_ := set $config "istio_gateway" (dict "namespace" (include "tokenway.podNamespace" .) "service" $service) }}
{{- else }}
{{- $edge := dict "admin_paths" (list "/drain_listeners") }}
{{- if .Values.envoy.tls.secret }}
{{- $tls := dict "cert_file" "/etc/tokenway-edge/tls.crt" "key_file" "/etc/tokenway-edge/tls.key" }}
{{- if .Values.envoy.tls.clientCa }}{{ $_ := set $tls "client_ca_file" "/etc/tokenway-edge-ca/ca.crt" }}{{ end }}
{{- $_ := set $edge "tls" $tls }}
{{- end }}
{{- $_ := set $config "edge" $edge }}
{{- end }}
{{- end }}
{{- $discovery := dict }}
{{- if include "tokenway.asksKubernetes" . }}
{{- $_ := set $discovery "kubernetes" (include "tokenway.kubernetes" . | fromYaml) }}
{{- end }}
{{- if include "tokenway.asksIstio" . }}
{{- $_ := set $discovery "istio" (include "tokenway.istiod" . | fromYaml) }}
{{- end }}
{{- if $discovery }}{{ $_ := set $config "discovery" $discovery }}{{ end }}
{{- if and .Values.modelServers.model (include "tokenway.asksKubernetes" .) }}
{{- $rule := dict "cluster" (include "tokenway.pool" .) }}
{{- $_ := set $config "models" (dict .Values.modelServers.model (dict "rules" (list $rule))) }}
{{- end }}
{{- with .Values.metadataCenter }}
{{- if .url }}
{{- $center := dict "url" .url }}
{{- if .username }}{{ $_ := set $center "username" .username }}{{ end }}
{{- if .passwordSecret.name }}{{ $_ := set $center "password_env" "TOKENWAY_STORE_PASSWORD" }}{{ end }}
{{- $_ := set $config "metadata_center" $center }}
{{- end }}
{{- end }}
{{- toYaml (mustMergeOverwrite $config (deepCopy .Values.config)) }}
{{- end }}
