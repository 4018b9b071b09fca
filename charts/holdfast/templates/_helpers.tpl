{{- define "holdfast.fullname" -}}
{{- if contains "holdfast" .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{ else }}{{ printf "%s-holdfast" .Release.Name | trunc 40 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "holdfast.driver" -}}csi.holdfast.io{{- end }}

{{/* (dict "root" $ "component" "metadata") */}}
{{- define "holdfast.selector" -}}
app.kubernetes.io/name: holdfast
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "holdfast.labels" -}}
{{ include "holdfast.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{/* (dict "root" $ "name" "node") */}}
{{- define "holdfast.image" -}}
{{ .root.Values.image.registry }}/{{ .name }}:{{ .root.Values.image.tag | default .root.Chart.AppVersion }}
{{- end }}

{{- define "holdfast.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "holdfast.metadataAddress" -}}
{{ .Values.metadataService.address | default (printf "%s-metadata.%s.svc:7440" (include "holdfast.fullname" .) .Release.Namespace) }}
{{- end }}

{{/* (dict "root" $ "component" "metadata"): the Secret with that component's certificate */}}
{{- define "holdfast.tlsSecret" -}}
{{- if eq .root.Values.tls.mode "existingSecrets" -}}
{{ index .root.Values.tls.existingSecrets .component }}
{{- else -}}
{{ include "holdfast.fullname" .root }}-{{ .component }}-tls
{{- end }}
{{- end }}

{{- define "holdfast.tlsArgs" -}}
{{- if ne .Values.tls.mode "none" }}
- --tls-ca=/tls/ca.crt
- --tls-cert=/tls/tls.crt
- --tls-key=/tls/tls.key
{{- end }}
{{- end }}

{{- define "holdfast.tlsMount" -}}
{{- if ne .Values.tls.mode "none" }}
- { name: tls, mountPath: /tls, readOnly: true }
{{- end }}
{{- end }}

{{- define "holdfast.tlsVolume" -}}
{{- if ne .root.Values.tls.mode "none" }}
- name: tls
  secret: { secretName: {{ include "holdfast.tlsSecret" . }} }
{{- end }}
{{- end }}

{{/* Names and addresses of the metadata service, as JSON: {"dns": […], "ips": […]} */}}
{{- define "holdfast.certificateNames" -}}
{{- $service := printf "%s-metadata" (include "holdfast.fullname" .) -}}
{{- $dns := list $service (printf "%s.%s" $service .Release.Namespace) (printf "%s.%s.svc" $service .Release.Namespace) (printf "%s.%s.svc.cluster.local" $service .Release.Namespace) "localhost" -}}
{{- $ips := list "127.0.0.1" -}}
{{- $more := .Values.metadataService.certificateNames -}}
{{- with .Values.metadataService.address }}{{ $more = append $more (regexReplaceAll ":[0-9]+$" . "" | trimPrefix "[" | trimSuffix "]") }}{{ end -}}
{{- with .Values.metadataService.service.clusterIP }}{{ if ne . "None" }}{{ $more = append $more . }}{{ end }}{{ end -}}
{{- range $more }}
{{- if or (regexMatch "^[0-9.]+$" .) (contains ":" .) }}{{ $ips = append $ips . }}{{ else }}{{ $dns = append $dns . }}{{ end -}}
{{- end -}}
{{ dict "dns" ($dns | uniq) "ips" ($ips | uniq) | toJson }}
{{- end }}

{{/* Environment of `holdfast …` in a pod. */}}
{{- define "holdfast.cliEnv" -}}
- { name: HOLDFAST_METADATA, value: {{ include "holdfast.metadataAddress" . | quote }} }
{{- if ne .Values.tls.mode "none" }}
- { name: HOLDFAST_TLS_CA, value: /tls/ca.crt }
- { name: HOLDFAST_TLS_CERT, value: /tls/tls.crt }
- { name: HOLDFAST_TLS_KEY, value: /tls/tls.key }
{{- end }}
{{- end }}

{{- define "holdfast.unprivileged" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: { drop: [ALL] }
{{- end }}

{{- define "holdfast.nonRoot" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile: { type: RuntimeDefault }
{{- end }}
