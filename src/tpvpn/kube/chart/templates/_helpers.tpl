{{- /* By which the manager's pods are found. */}}
{{- define "tpvpn.selector" -}}
app.kubernetes.io/name: tpvpn
app.kubernetes.io/component: manager
{{- end }}

{{- define "tpvpn.labels" -}}
app.kubernetes.io/name: tpvpn
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- /* The token file, with what the cluster has already for tokens that are not given. */}}
{{- define "tpvpn.tokens" -}}
{{- $kept := dict }}
{{- with lookup "v1" "Secret" .Release.Namespace "tpvpn" }}
{{- range splitList "\n" (get .data "tokens" | default "" | b64dec) }}
{{- $words := splitn ": " 2 . }}
{{- if $words._1 }}{{ $_ := set $kept $words._0 $words._1 }}{{ end }}
{{- end }}
{{- end }}
{{- range $name, $token := .Values.tokens | default (dict "default" "") }}
{{- $name }}: {{ $token | default (get $kept $name) | default (randAlphaNum 48) }}
{{ end }}
{{- end }}

{{- /* Certificate and key, base64, as JSON: those that the cluster has, else new ones. */}}
{{- define "tpvpn.certificate" -}}
{{- $kept := lookup "v1" "Secret" .Release.Namespace "tpvpn-tls" }}
{{- if $kept }}
{{- pick $kept.data "tls.crt" "tls.key" | toJson }}
{{- else }}
{{- $host := printf "tpvpn.%s.svc" .Release.Namespace }}
{{- $made := genSelfSignedCertWithKey "tpvpn" nil (list $host) 3650 (genPrivateKey "ecdsa") }}
{{- dict "tls.crt" ($made.Cert | b64enc) "tls.key" ($made.Key | b64enc) | toJson }}
{{- end }}
{{- end }}

{{- /* A mapping without what was left empty. */}}
{{- define "tpvpn.given" -}}
{{- $given := dict }}
{{- range $key, $value := . }}{{ if $value }}{{ $_ := set $given $key $value }}{{ end }}{{ end }}
{{- toJson $given }}
{{- end }}

{{- /* What PodSecurity `restricted` admits. The sysctl, which counts as safe, lets nobody answer ping. */}}
{{- define "tpvpn.restricted" -}}
runAsNonRoot: true
runAsUser: 65534
runAsGroup: 65534
fsGroup: 65534
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "tpvpn.powerless" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}
